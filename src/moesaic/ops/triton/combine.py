"""The weighted sum of a token's rows: ``z[t] = sum over k of weights[t, k] * y[positions[t, k]]``.

A gather for every token instead of a scatter from every row: no atomics, and one rounding.

Legend: T tokens, K copies a token, R rows, D model dim.
"""

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 4
_COLUMNS = 512


def combine(
    y_RD: Tensor,
    positions_TK: Tensor,
    weights_TK: Tensor | None,
    *,
    plus: Tensor | None = None,
    biases: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """``[T, D]``. Copies that are not here (position -1) add nothing; without ``weights`` every weight is 1.

    Args:
        plus: rows ``[R, D]`` to add to those of ``y``.
        biases: ``[E, D]``, of which the copy of expert ``ids[t, k]`` has one added.
        ids: ``[T, K]``, with ``biases``.
    """
    (T, K), D = positions_TK.shape, y_RD.shape[1]
    z_TD = y_RD.new_empty(T, D)
    if z_TD.numel():
        columns = min(_COLUMNS, triton.next_power_of_2(D))
        grid = (triton.cdiv(T, _TOKENS), triton.cdiv(D, columns))
        weights = y_RD if weights_TK is None else weights_TK.contiguous()
        b = y_RD if biases is None else biases
        _combine_kernel[grid](
            y_RD,
            y_RD if plus is None else plus,
            positions_TK,
            weights,
            b,
            positions_TK if ids is None else ids,
            z_TD,
            T,
            K,
            D,
            *b.stride(),
            HAS_WEIGHTS=weights_TK is not None,
            HAS_PLUS=plus is not None,
            HAS_BIASES=biases is not None,
            BT=_TOKENS,
            BD=columns,
        )
    return z_TD


@triton.jit
def _combine_kernel(
    y,
    plus,
    positions,
    weights,
    biases,
    ids,
    z,
    T,
    K,
    D,
    stride_be,
    stride_bd,
    HAS_WEIGHTS: tl.constexpr,
    HAS_PLUS: tl.constexpr,
    HAS_BIASES: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BT, BD), tl.float32)
    for k in tl.range(0, K):
        slots = tokens.to(tl.int64) * K + k
        rows = tl.load(positions + slots, mask=tokens < T, other=-1).to(tl.int64)
        mask = (rows >= 0)[:, None] & (columns < D)[None, :]
        values = tl.load(y + (rows * D)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_PLUS:
            values += tl.load(plus + (rows * D)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIASES:
            expert = tl.load(ids + slots, mask=rows >= 0, other=0).to(tl.int64)
            b = biases + (expert * stride_be)[:, None] + (columns.to(tl.int64) * stride_bd)[None, :]
            values += tl.load(b, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            values *= tl.load(weights + slots, mask=rows >= 0, other=0.0).to(tl.float32)[:, None]
        acc += values
    out = z + (tokens.to(tl.int64) * D)[:, None] + columns[None, :]
    tl.store(out, acc.to(z.dtype.element_ty), mask=(tokens < T)[:, None] & (columns < D)[None, :])
