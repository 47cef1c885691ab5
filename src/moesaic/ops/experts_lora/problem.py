"""What an implementation of experts_lora is given, and what it gives back.

Legend: W matrices, I and O the dims that a projection comes from and goes to, r the rank of its adapter.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from moesaic.ops.experts_lora.dropout import Dropout, check_dropout
from moesaic.ops.experts_lora.operands import FACTOR_NAMES
from moesaic.ops.experts_mlp.activation import Activation
from moesaic.ops.experts_mlp.operands import NAMES as BASE
from moesaic.ops.experts_mlp.problem import Problem, one_block


class LowRank(NamedTuple):
    """The factors of what is added to a weight: ``a [W, I, r]`` and ``b [W, r, O]``."""

    a: Tensor
    b: Tensor


class Adapted(NamedTuple):
    """The operands of the experts, and what is added to their weights.

    Attributes:
        base: the experts without adapters.
        up: for each projection to the hidden dim its factors, or None.
        down: those of the projection back.
        dropout: of what the factors are applied to; None for none.
    """

    base: Problem
    up: tuple[LowRank | None, ...]
    down: LowRank | None
    dropout: Dropout | None = None


class FactorGradients(NamedTuple):
    """The gradients of a projection's factors."""

    a: Tensor
    b: Tensor


class Gradients(NamedTuple):
    """Of everything that has a gradient; None where there is nothing, or where it is not wanted."""

    x_TD: Tensor | None
    weights_TK: Tensor | None
    up: tuple[FactorGradients | None, ...]
    down: FactorGradients | None


class Wanted(NamedTuple):
    """Which gradients a backward pass gives back."""

    x: bool
    weights: bool
    factors: bool


def adapted(given: Mapping[str, Any], activation: Activation, dropout: float, copies: Tensor | None = None) -> Adapted:
    """The operands of an operator, of all blocks together.

    Raises:
        ValueError: a dropout that is no probability below 1, or one without keys or columns.
    """
    check_dropout(dropout)
    keys_BNK, columns_F = given["keys"], given["columns"]
    if dropout and (keys_BNK is None or columns_F is None):
        raise ValueError(f"dropout: {dropout} needs keys and columns; give both")
    base = one_block({name: given[name] for name in BASE}, activation, copies)
    w1, w3, w2 = (_factors(given, weight) for weight in ("w1", "w3", "w2"))
    mask = Dropout(dropout, keys_BNK.flatten(0, 1), columns_F) if dropout else None
    return Adapted(base, (w1, w3)[: len(base.projections)], w2, mask)


def by_factor(gradients: Gradients) -> dict[str, Any]:
    """The gradients of the factors by their names."""
    pairs = [*gradients.up, *[None] * (2 - len(gradients.up)), gradients.down]
    found = [t for pair in pairs for t in (pair or (None, None))]
    return dict(zip(FACTOR_NAMES, found, strict=True))


def _factors(given: Mapping[str, Any], weight: str) -> LowRank | None:
    a, b = given[f"{weight}_a"], given[f"{weight}_b"]
    return None if a is None or b is None else LowRank(a, b)
