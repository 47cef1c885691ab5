"""The operands of experts_lora: those of experts_mlp, and two factors for each weight.

Legend: B blocks, N tokens a block, K copies a token (top-k), W matrices of all blocks, D model dim, F hidden dim, P, Q,
S the ranks of the adapters of w1, w3 and w2.
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
# With dropout: a key for each copy, and the number of each hidden column, of which a rank may have some.
INDICES = (
    Operand("keys", "B N K", optional=True, differentiable=False),
    Operand("columns", "F", optional=True, differentiable=False),
)
# In the schemas behind the operands of experts_mlp.
OWN_NAMES = (*FACTOR_NAMES, *(operand.name for operand in INDICES))
OWN_SCHEMA = ", ".join(f"Tensor? {name}" for name in OWN_NAMES)
NAMES = (*BASE, *OWN_NAMES)
# The weights and biases are frozen.
WITH_GRADIENT = ("x", "weights", *FACTOR_NAMES)
SCHEMA = f"{BASE_SCHEMA}, {OWN_SCHEMA}"


def named(tensors: tuple[Any, ...]) -> dict[str, Any]:
    """The operands of a call by name."""
    return dict(zip(NAMES, tensors, strict=True))
