"""The operands of experts_lora: those of experts_mlp, and two factors for each weight.

Legend: W matrices of all blocks, D model dim, F hidden dim, P, Q, S the ranks of the adapters of w1, w3 and w2.
"""

from typing import Any

from moesaic.ops.experts_mlp.operands import NAMES as BASE
from moesaic.ops.experts_mlp.operands import SCHEMA as BASE_SCHEMA
from moesaic.ops.experts_mlp.operands import Operand

FACTORS = (
    Operand("w1_a", "W D P", optional=True),
    Operand("w1_b", "W P F", optional=True),
    Operand("w3_a", "W D Q", optional=True),
    Operand("w3_b", "W Q F", optional=True),
    Operand("w2_a", "W F S", optional=True),
    Operand("w2_b", "W S D", optional=True),
)
FACTOR_NAMES = tuple(operand.name for operand in FACTORS)
NAMES = (*BASE, *FACTOR_NAMES)
# The weights and biases are frozen.
WITH_GRADIENT = ("x", "weights", *FACTOR_NAMES)
SCHEMA = ", ".join([BASE_SCHEMA, *(f"Tensor? {name}" for name in FACTOR_NAMES)])


def named(tensors: tuple[Any, ...]) -> dict[str, Any]:
    """The operands of a call by name."""
    return dict(zip(NAMES, tensors, strict=True))
