"""Grouped matrix multiplication: row block ``i`` of ``x`` meets ``w[i]``."""

from moesaic.ops.grouped_mm.api import grouped_mm

__all__ = ["grouped_mm"]
