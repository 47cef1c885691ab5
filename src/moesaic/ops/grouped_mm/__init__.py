"""Grouped matrix multiplication: row block ``i`` of ``x`` meets ``w[i]``."""

from moesaic.ops.grouped_mm.accumulate import accumulate_weight_grad
from moesaic.ops.grouped_mm.api import grouped_mm
from moesaic.ops.grouped_mm.implementations import Implementation
from moesaic.ops.grouped_mm.weight_grad import grouped_mm_weight_grad

__all__ = ["Implementation", "accumulate_weight_grad", "grouped_mm", "grouped_mm_weight_grad"]
