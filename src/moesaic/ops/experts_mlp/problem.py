"""What an implementation of experts_mlp is given, and what it gives back.

Legend: T tokens, K copies a token (top-k), L lines of the pre-activations, D model dim, F hidden dim, E experts.
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


class Listed(NamedTuple):
    """The copies that are here, where a call lists them. Slot ``t * K + k`` is copy ``k`` of token ``t``.

    Attributes:
        slots_L: the slot of each line, -1 for none.
        lines_TK: the line of each slot, -1 for a copy that is not listed.
    """

    slots_L: Tensor
    lines_TK: Tensor

    def to_lines(self, t_TK: Tensor, nothing: int | float) -> Tensor:
        """``[L]``, the values of copies line by line; ``nothing`` for a line of no copy."""
        # One entry more, for there may be no slot at all.
        padded = torch.nn.functional.pad(t_TK.flatten(), (0, 1), value=nothing)
        return padded.index_select(0, torch.where(self.slots_L < 0, t_TK.numel(), self.slots_L))

    def to_slots(self, t_L: Tensor, nothing: int | float) -> Tensor:
        """``[T, K]``, the values of lines copy by copy; ``nothing`` for a copy that has no line."""
        padded = torch.nn.functional.pad(t_L, (0, 1), value=nothing)
        lines = torch.where(self.lines_TK < 0, t_L.numel(), self.lines_TK).flatten()
        return padded.index_select(0, lines).view(self.lines_TK.shape)


class Problem(NamedTuple):
    """The operands. An id outside ``0 .. E - 1`` marks a copy that is not here.

    Pre-activations are lines ``[L, F]``: one for each slot, or for each copy of a list.

    Attributes:
        projections: from D to F; gate and up, or one without gate.
        down: from F to D.
        listed: the list, if there is one. Ids of copies that are not on it are -1.
    """

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    projections: tuple[Projection, ...]
    down: Projection
    activation: Activation
    listed: Listed | None = None

    @property
    def num_experts(self) -> int:
        return self.down.weight.shape[0]

    @property
    def num_lines(self) -> int:
        return self.ids_TK.numel() if self.listed is None else self.listed.slots_L.numel()

    def to_lines(self, t_TK: Tensor, nothing: int | float) -> Tensor:
        """``[L]``, the values of copies line by line; ``nothing`` for a line of no copy."""
        return t_TK.flatten() if self.listed is None else self.listed.to_lines(t_TK, nothing)

    def to_slots(self, t_L: Tensor, nothing: int | float) -> Tensor:
        """``[T, K]``, the values of lines copy by copy; ``nothing`` for a copy that has no line."""
        return t_L.view(self.ids_TK.shape) if self.listed is None else self.listed.to_slots(t_L, nothing)


class Forward(NamedTuple):
    """The result, and lines that the projections gave, zero for copies that are not here; nothing if not saved."""

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


def one_block(given: Mapping[str, Any], activation: Activation, copies: Tensor | None = None) -> Problem:
    """The operands of an operator, of all blocks together: ids count the matrices of all blocks."""
    x_BND, ids_BNK, weights_BNK, experts_BG = (given[name] for name in ("x", "ids", "weights", "experts"))
    ids_BNK = number_by_matrix(ids_BNK, experts_BG.shape[1])
    x_TD, ids_TK, weights_TK = (t.flatten(0, 1) for t in (x_BND, ids_BNK, weights_BNK))
    up = tuple(Projection(w, given[bias]) for weight, bias in UP if (w := given[weight]) is not None)
    listed = None
    if copies is not None:
        listed = _listed(copies, ids_BNK)
        ids_TK = ids_TK.masked_fill(listed.lines_TK < 0, -1)
    return Problem(x_TD, ids_TK, weights_TK, up, Projection(given[DOWN[0]], given[DOWN[1]]), activation, listed)


def _listed(copies_BC: Tensor, ids_BNK: Tensor) -> Listed:
    """The list of all blocks together."""
    B, N, K = ids_BNK.shape
    first_B1 = (torch.arange(B, device=copies_BC.device) * (N * K)).unsqueeze(1)
    is_copy_BC = (copies_BC >= 0) & (copies_BC < N * K)
    slots_L = torch.where(is_copy_BC, copies_BC.to(torch.int64) + first_B1, -1).flatten()
    # What is no copy is written past the end.
    lines = slots_L.new_full((B * N * K + 1,), -1)
    lines.scatter_(0, torch.where(slots_L < 0, B * N * K, slots_L), torch.arange(len(slots_L), device=slots_L.device))
    return Listed(slots_L, lines[:-1].view(B * N, K))


def number_by_matrix(ids_BTK: Tensor, G: int) -> Tensor:
    """Ids that count each block's own ``G`` experts as numbers of matrices; -1 for copies that are not here.

    Of one block they are that already.
    """
    B = ids_BTK.shape[0]
    if B <= 1:
        return ids_BTK
    first_B11 = (torch.arange(B, device=ids_BTK.device) * G)[:, None, None]
    return torch.where((ids_BTK >= 0) & (ids_BTK < G), ids_BTK + first_B11, -1)
