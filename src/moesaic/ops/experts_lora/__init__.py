"""The routed experts with low-rank adapters, in one operator."""

from moesaic.ops.experts_lora.api import experts_lora

__all__ = ["experts_lora"]
