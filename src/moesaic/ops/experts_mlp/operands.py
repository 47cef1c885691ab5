"""The operands of experts_mlp, declared once.

Schemas, fakes, the flags that say which gradients are wanted, and the gradients' shapes follow from this table.

Legend: B blocks, N tokens a block, K copies a token (top-k), C copies a block that are listed, D model dim, F hidden
dim, G experts a block, W matrices of all blocks.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.ops.arguments import check_dtype_of, check_fit
from moesaic.ops.dtypes import FLOATS, INDICES
from moesaic.ops.experts_mlp.activation import check_activation
from moesaic.ops.grouped_mm.groups import accumulation_dtype


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

# Which copies are here, ``[B, C]``: by their slots ``t * K + k`` in their block, -1 for none. It comes last, behind the
# flags, and may be left out; then each slot has a place in the pre-activations.
COPIES = "Tensor? copies=None"

# Weight and bias of the gate and the up projection, and of the one down.
UP = (("w1", "b1"), ("w3", "b3"))
DOWN = ("w2", "b2")

_DIMS = {operand.name: tuple(operand.dims.split()) for operand in OPERANDS}

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


_GRAD, _HIDDEN, _LISTED = ("B", "N", "D"), ("B", "N", "K", "F"), ("B", "C", "F")


def check_operands(
    operator: str,
    given: Mapping[str, Any],
    activation: str,
    backward: Mapping[str, Tensor | None] = MappingProxyType({}),
    buffers: Mapping[str, Tensor | None] = MappingProxyType({}),
    factors: Sequence[Operand] = (),
    indices: Sequence[Operand] = (),
    copies: Tensor | None = None,
) -> None:
    """Raise unless the operands of an operator fit: sizes, device, dtypes, the activation.

    Args:
        backward: what a backward operator takes besides, ``grad``, ``h1`` and ``h3``.
        buffers: what gradients of weights are added to, by the names of these.
        factors: further operands, of the dtype of ``x``.
        indices: further operands, of int64.
        copies: which copies are here.

    Raises:
        ValueError: shapes, devices, activation, or a buffer that is neither contiguous nor the ``.mT`` of what is.
        TypeError: dtypes.
    """
    check_activation(activation, given["w3"] is not None)
    own = [(operand.name, given[operand.name], _DIMS[operand.name]) for operand in OPERANDS]
    kept = _HIDDEN if copies is None else _LISTED
    others = [(name, t, _GRAD if name == "grad" else kept) for name, t in backward.items()]
    others += [(factor.name, given[factor.name], tuple(factor.dims.split())) for factor in factors]
    into = [(f"the buffer for {name}", t, _DIMS[name]) for name, t in buffers.items()]
    numbers = [(operand.name, given[operand.name], tuple(operand.dims.split())) for operand in indices]
    check_fit(operator, [*own, ("copies", copies, ("B", "C")), *others, *into, *numbers])
    x, ids, weights = given["x"], given["ids"], given["weights"]
    assert x is not None
    assert ids is not None
    assert weights is not None
    check_dtype_of(operator, x.dtype, [(name, t) for name, t, _ in (*own[4:], *others)])
    if ids.dtype not in INDICES or weights.dtype not in FLOATS:
        raise TypeError(
            f"{operator}: ids, weights: expected int32 or int64 and floats, got {ids.dtype}, {weights.dtype}"
        )
    if copies is not None and copies.dtype not in INDICES:
        raise TypeError(f"{operator}: copies: expected int32 or int64, got {copies.dtype}")
    check_dtype_of(operator, torch.int64, [(name, t) for name, t, _ in numbers])
    check_dtype_of(operator, accumulation_dtype(x.dtype), [(name, t) for name, t, _ in into])
    for name, t, _ in into:
        if t is not None and not (t.is_contiguous() or t.mT.is_contiguous()):
            raise ValueError(
                f"{operator}: {name}: has strides {t.stride()}; give a contiguous tensor, or the .mT of one"
            )
    for weight, bias in UP:
        if given[weight] is None and given[bias] is not None:
            raise ValueError(f"{operator}: {bias}: given without {weight}; leave it out")


def by_name(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values for the operands with a gradient, in the place of each operand; None for the others."""
    of = dict(zip(WITH_GRADIENT, values, strict=True))
    return tuple(of.get(name) for name in NAMES)
