"""``grouped_gemm.ops``: products and permutations with gradients.

Legend: T tokens, K copies a token (top-k), R rows, D model dim, E experts.
"""

from typing import NoReturn

import torch
from torch import Tensor

from moesaic import ops as moesaic_ops
from moesaic.compat.grouped_gemm import backend
from moesaic.compat.grouped_gemm.backend import refuse_fp8
from moesaic.ops.arguments import check_given, check_tensors


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """``a[rows of e] @ b[e]``, or ``@ b[e].T``: see :func:`moesaic.compat.grouped_gemm.backend.gmm`."""
    return backend.gmm(a, b, batch_sizes, trans_b=trans_b)


def sinkhorn_kernel(cost: Tensor, tol: float = 0.0001) -> NoReturn:
    """Not here: raises ``NotImplementedError``."""
    backend.sinkhorn(cost, tol)


def permute(
    input_act: Tensor, indices: Tensor, num_out_tokens: int | None = None, max_token_num: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Lay out the copies of tokens by their expert: by (expert, token, copy).

    Args:
        input_act: ``[T, D]``.
        indices: the expert of each copy, ``[T, K]``, or ``[T]`` for one copy a token; any integers.
        num_out_tokens: how many rows to keep; the copies past them are dropped. None or 0 keeps all.
        max_token_num: size of a workspace in grouped_gemm; not needed here, and ignored.

    Returns:
        The rows, and ``row_id_map [K * T]`` int32: at ``k * T + t`` the row of copy ``k`` of token ``t``, -1 if it was
        dropped. Of an empty ``input_act`` itself and None, as in grouped_gemm.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: fp8.
    """
    refuse_fp8(input_act=input_act)
    check_given(indices=indices)
    if not input_act.numel():
        return input_act, None
    indices_TK = indices.unsqueeze(1) if indices.ndim == 1 else indices
    if indices_TK.ndim != 2 or indices_TK.shape[0] != input_act.shape[0]:
        raise ValueError(f"indices: expected [{input_act.shape[0]}, K] to match input_act, got {list(indices.shape)}")
    slots = torch.sort(indices_TK.flatten().to(input_act.device), stable=True).indices
    num_rows = min(num_out_tokens or slots.numel(), slots.numel())
    positions = torch.full_like(slots, -1)
    positions[slots[:num_rows]] = torch.arange(num_rows, device=slots.device)
    positions_TK = positions.view(indices_TK.shape)
    rows = moesaic_ops.permute(input_act, _permutation(slots[:num_rows], positions_TK))
    return rows, positions_TK.mT.flatten().to(torch.int32)


def unpermute(input_act: Tensor, row_id_map: Tensor | None, probs: Tensor | None = None) -> Tensor:
    """Bring rows back to their tokens: ``z[t] = sum over k of probs[t, k] * input_act[row of copy k of t]``.

    Args:
        input_act: ``[R, D]``, in the order of :func:`permute`.
        row_id_map: from :func:`permute`.
        probs: ``[T, K]``; None for one copy a token, of weight 1.

    Returns:
        ``[T, D]``; a dropped copy adds nothing. An empty ``input_act`` as it is, as in grouped_gemm.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: fp8.
    """
    refuse_fp8(input_act=input_act)
    check_tensors(row_id_map=row_id_map, probs=probs)
    if row_id_map is None or not input_act.numel():
        return input_act
    T, K = (row_id_map.numel(), 1) if probs is None else tuple(probs.shape)
    if row_id_map.numel() != T * K:
        raise ValueError(f"probs: expected T * K = {row_id_map.numel()} values to match row_id_map, got [{T}, {K}]")
    positions_TK = row_id_map.to(input_act.device, torch.int64).view(K, T).mT.contiguous()
    slots = torch.full((input_act.shape[0] + 1,), -1, device=input_act.device)
    copies = torch.arange(T * K, device=slots.device)
    # A dropped copy has no row: its slot goes to one more than there are.
    slots[torch.where(positions_TK < 0, input_act.shape[0], positions_TK).flatten()] = copies
    return moesaic_ops.combine(input_act, _permutation(slots[:-1], positions_TK), probs)


def _permutation(slots_R: Tensor, positions_TK: Tensor) -> moesaic_ops.Permutation:
    # Neither direction reads the sizes of the groups.
    return moesaic_ops.Permutation(slots_R.contiguous(), positions_TK, slots_R.new_empty(0))
