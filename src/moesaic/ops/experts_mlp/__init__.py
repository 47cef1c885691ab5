"""The routed experts in one operator."""

from moesaic.ops.experts_mlp.activation import ACTIVATIONS, Activation, gated
from moesaic.ops.experts_mlp.api import experts_mlp

__all__ = ["ACTIVATIONS", "Activation", "experts_mlp", "gated"]
