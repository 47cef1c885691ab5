"""Operators on plain tensors. They know nothing of DTensor, modules or process groups."""

from moesaic.ops.debug import debug_checks
from moesaic.ops.experts_lora import experts_lora
from moesaic.ops.experts_mlp import ACTIVATIONS, Activation, experts_mlp, gated
from moesaic.ops.grouped_mm import Implementation, accumulate_weight_grad, grouped_mm, grouped_mm_weight_grad
from moesaic.ops.invariant import batch_invariant
from moesaic.ops.permute import Permutation, combine, permute, sort_by_expert
from moesaic.ops.quantized import QuantizedWeight, quantize

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Implementation",
    "Permutation",
    "QuantizedWeight",
    "accumulate_weight_grad",
    "batch_invariant",
    "combine",
    "debug_checks",
    "experts_lora",
    "experts_mlp",
    "gated",
    "grouped_mm",
    "grouped_mm_weight_grad",
    "permute",
    "quantize",
    "sort_by_expert",
]
