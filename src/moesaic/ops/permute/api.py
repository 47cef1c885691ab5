"""Sort token copies by expert (`sort_by_expert`), lay rows out in that order (`permute`), bring them back (`combine`).

Legend: T tokens, K copies a token (top-k), R rows, D model dim, E experts.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.ops.arguments import check_floats, check_given, check_int, check_tensors
from moesaic.ops.forward_ad import refuse_forward_ad
from moesaic.ops.permute import ops  # noqa: F401 -- registers the operators


class Permutation(NamedTuple):
    """How token copies are laid out as rows grouped by expert.

    Slot ``t * K + k`` is copy ``k`` of token ``t``.

    Attributes:
        slots: ``[R]``, the slot that row ``r`` holds; -1 for a padding row.
        positions: ``[T, K]``, the row that holds copy ``k`` of token ``t``; -1 for a copy that is not here.
        group_sizes: ``[E]``, how many rows each expert has.
    """

    slots: Tensor
    positions: Tensor
    group_sizes: Tensor


def sort_by_expert(ids: Int[Tensor, "T K"], num_experts: int, *, num_rows: int | None = None) -> Permutation:
    """Group token copies by expert: row order is (expert, token, k).

    The sort is stable, so the order, and with it every rounding error that follows, depends on the routing alone.

    Args:
        ids: the expert of every token copy. Ids outside ``0 .. num_experts - 1`` are copies that are not here (of
            experts on other ranks, say): they get no row.
        num_experts: E.
        num_rows: R, how many rows to lay out; padding rows follow the last expert's. Default ``T * K``.

    Raises:
        ValueError: shapes; and, on CPU or under :func:`moesaic.debug_checks`, more routed copies than ``num_rows``.
        TypeError: ids that are not integers.

    Example:
        >>> sort_by_expert(torch.tensor([[1, 0], [1, 1]]), num_experts=2).slots
        tensor([1, 0, 2, 3])
    """
    check_given(ids=ids)
    check_int("num_experts", num_experts)
    if num_rows is not None:
        check_int("num_rows", num_rows)
    if ids.ndim != 2:
        raise ValueError(f"ids: expected [T, K], got {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids: dtype {ids.dtype} is not supported; use an integer type")
    if num_experts < 1:
        raise ValueError(f"num_experts: must be at least 1, got {num_experts}")
    if num_rows is not None and num_rows < 0:
        raise ValueError(f"num_rows: must be at least 0, got {num_rows}")
    return Permutation(
        *torch.ops.moesaic.sort_by_expert(ids, num_experts, ids.numel() if num_rows is None else num_rows)
    )


def permute(
    x: Float[Tensor, "T D"], permutation: Permutation, weights: Float[Tensor, "T K"] | None = None
) -> Float[Tensor, "R D"]:
    """Lay out token rows by expert: ``y[r] = weights[slot of r] * x[token of r]``, and 0 in padding rows.

    Without ``weights`` rows are copied. Differentiable in ``x`` and ``weights`` any number of times; the gradient of
    ``x`` is a gather-sum over the K copies, hence deterministic.

    Raises:
        ValueError: shapes or devices that do not fit the permutation.
        TypeError: dtypes other than fp64, fp32, bf16 and fp16; a permutation that :func:`sort_by_expert` did not make.
    """
    check_given(x=x)
    check_tensors(weights=weights)
    refuse_forward_ad("permute", x, weights)
    _check(x, permutation, weights, "x", "positions")
    return torch.ops.moesaic.permute(x, permutation.slots, permutation.positions, weights)


def combine(
    y: Float[Tensor, "R D"], permutation: Permutation, weights: Float[Tensor, "T K"] | None = None
) -> Float[Tensor, "T D"]:
    """Bring rows back to their tokens: ``z[t] = sum over k of weights[t, k] * y[row of copy k of t]``.

    Copies that are not here add nothing; a token without any is zero. Without ``weights`` every weight is 1. Sums are
    accumulated in fp32 for half types, in the order of k. Differentiable in ``y`` and ``weights`` any number of times.

    Raises:
        ValueError, TypeError: as :func:`permute`.
    """
    check_given(y=y)
    check_tensors(weights=weights)
    refuse_forward_ad("combine", y, weights)
    _check(y, permutation, weights, "y", "slots")
    return torch.ops.moesaic.combine(y, permutation.slots, permutation.positions, weights)


def _check(rows: Tensor, permutation: Permutation, weights: Tensor | None, name: str, of: str) -> None:
    if not isinstance(permutation, Permutation):
        raise TypeError(f"permutation: expected the result of sort_by_expert, got {type(permutation).__name__}")
    check_floats(**{name: rows, "weights": weights})
    expected = getattr(permutation, of).shape[0]
    if rows.ndim != 2 or rows.shape[0] != expected:
        raise ValueError(f"{name}: expected [{expected}, D] for this permutation, got {list(rows.shape)}")
    if weights is not None and weights.shape != permutation.positions.shape:
        raise ValueError(f"weights: expected {list(permutation.positions.shape)}, got {list(weights.shape)}")
    for argument, t in ((name, rows), ("weights", weights)):
        if t is not None and t.device != permutation.slots.device:
            raise ValueError(
                f"{argument}: is on {t.device}, the permutation on {permutation.slots.device}; move it there"
            )
