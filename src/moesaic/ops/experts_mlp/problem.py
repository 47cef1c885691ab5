"""What an implementation of experts_mlp is given, and what it gives back.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, E experts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.ops import pool
from moesaic.ops.experts_mlp.activation import Activation
from moesaic.ops.experts_mlp.operands import DOWN, UP
from moesaic.ops.layout import is_transposed
from moesaic.ops.quantized.weight import Weight


class Projection(NamedTuple):
    """``x w[e] + b[e]``: a weight ``[E, in, out]``, and a bias ``[E, out]`` or None."""

    weight: Weight
    bias: Tensor | None = None


class Problem(NamedTuple):
    """The operands. An id outside ``0 .. E - 1`` marks a copy that is not here.

    Attributes:
        projections: from D to F; gate and up, or one without gate.
        down: from F to D.
    """

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    projections: tuple[Projection, ...]
    down: Projection
    activation: Activation

    @property
    def num_experts(self) -> int:
        return self.down.weight.shape[0]


class Forward(NamedTuple):
    """The result, and what the projections gave for every copy, zero where it is not here; nothing if not saved."""

    z_TD: Tensor
    hidden: tuple[Tensor, ...]


class Target:
    """Where the gradient of a weight or bias goes: to a new tensor, or to one that it is added to.

    A weight's gradient lies in memory as the weight does, or is added to contiguous matrices or the ``.mT`` of such.
    Then it has the accumulation dtype, and an expert without rows keeps its values.

    Args:
        like: the weight or bias.
        add_to: what the gradient is added to.

    Attributes:
        buffer: the gradient, once it is there; what it is added to.
    """

    def __init__(self, like: Tensor, add_to: Tensor | None = None) -> None:
        self.like, self.buffer, self.adds = like, add_to, add_to is not None
        result = like if add_to is None else add_to
        self.dtype, self.is_transposed = result.dtype, like.ndim == 3 and is_transposed(result)

    def take(self, gradient: Tensor) -> None:
        """Keep a gradient that was computed elsewhere, or add it."""
        if self.adds:
            self.memory().add_(gradient)
        else:
            self.buffer = self._laid_out(gradient.to(self.dtype))

    def memory(self) -> Tensor:
        """For those who write or add the gradient themselves."""
        if self.buffer is None:
            shape = self.like.mT.shape if self.is_transposed else self.like.shape
            empty = pool.empty(tuple(shape), self.dtype) if self.like.is_cpu else self.like.new_empty(shape)
            self.buffer = empty.mT if self.is_transposed else empty
        return self.buffer

    def _laid_out(self, gradient: Tensor) -> Tensor:
        return gradient.mT.contiguous().mT if self.is_transposed else gradient.contiguous()


class Targets(NamedTuple):
    """Where the gradients of a :class:`Projection` go; None for one that is not wanted."""

    weight: Target | None
    bias: Target | None


class Wanted(NamedTuple):
    """Which gradients a backward pass gives back, and where it writes those of the projections."""

    x: bool
    weights: bool
    projections: tuple[Targets, ...]
    down: Targets


class Gradients(NamedTuple):
    """The gradients of the tokens and of the routing weights, of their dtypes; None where one is not wanted."""

    x_TD: Tensor | None
    weights_TK: Tensor | None


def one_block(given: Mapping[str, Any], activation: Activation) -> Problem:
    """The operands of an operator, of all blocks together: ids count the matrices of all blocks."""
    x_BND, ids_BNK, weights_BNK, experts_BG = (given[name] for name in ("x", "ids", "weights", "experts"))
    ids_BNK = number_by_matrix(ids_BNK, experts_BG.shape[1])
    x_TD, ids_TK, weights_TK = (t.flatten(0, 1) for t in (x_BND, ids_BNK, weights_BNK))
    up = tuple(Projection(w, given[bias]) for weight, bias in UP if (w := given[weight]) is not None)
    return Problem(x_TD, ids_TK, weights_TK, up, Projection(given[DOWN[0]], given[DOWN[1]]), activation)


def number_by_matrix(ids_BTK: Tensor, G: int) -> Tensor:
    """Ids that count each block's own ``G`` experts as numbers of matrices; -1 for copies that are not here.

    Of one block they are that already.
    """
    B = ids_BTK.shape[0]
    if B <= 1:
        return ids_BTK
    first_B11 = (torch.arange(B, device=ids_BTK.device) * G)[:, None, None]
    return torch.where((ids_BTK >= 0) & (ids_BTK < G), ids_BTK + first_B11, -1)
