"""The operands of experts_mlp, declared once.

Schemas, fakes, the flags that say which gradients are wanted, and the gradients' shapes follow from this table.

Legend: B blocks, N tokens a block, K copies a token (top-k), D model dim, F hidden dim, G experts a block, W matrices
of all blocks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Operand(NamedTuple):
    """A tensor argument of the operators.

    Attributes:
        dims: a letter of the legend for each dim.
        optional: whether a call may leave it out.
        differentiable: whether it has a gradient.
    """

    name: str
    dims: str
    optional: bool = False
    differentiable: bool = True


OPERANDS = (
    Operand("x", "B N D"),
    Operand("ids", "B N K", differentiable=False),
    Operand("weights", "B N K"),
    # Only its shape is read. It tells G, which a rank's shard of the weights does not.
    Operand("experts", "B G", differentiable=False),
    Operand("w1", "W D F"),
    Operand("w3", "W D F", optional=True),
    Operand("w2", "W F D"),
    Operand("b1", "W F", optional=True),
    Operand("b3", "W F", optional=True),
    Operand("b2", "W D", optional=True),
)

NAMES = tuple(operand.name for operand in OPERANDS)
WITH_GRADIENT = tuple(operand.name for operand in OPERANDS if operand.differentiable)
SCHEMA = ", ".join(f"Tensor{'?' * operand.optional} {operand.name}" for operand in OPERANDS)

# Weight and bias of the gate and the up projection, and of the one down.
UP = (("w1", "b1"), ("w3", "b3"))
DOWN = ("w2", "b2")

Given = Mapping[str, Tensor | None]


def named(tensors: tuple[Any, ...]) -> dict[str, Any]:
    """The operands of a call by name."""
    return dict(zip(NAMES, tensors, strict=True))


def shapes(given: Given) -> dict[str, tuple[Any, ...]]:
    """The shape of every operand, of those that are not given too."""
    sizes: dict[str, Any] = {}
    for operand in OPERANDS:
        t = given[operand.name]
        if t is not None:
            sizes.update(zip(operand.dims.split(), t.shape, strict=True))
    return {operand.name: tuple(sizes[dim] for dim in operand.dims.split()) for operand in OPERANDS}


def by_name(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values for the operands with a gradient, in the place of each operand; None for the others."""
    of = dict(zip(WITH_GRADIENT, values, strict=True))
    return tuple(of.get(name) for name in NAMES)
