"""Rows of a group times its weight: ``y[r] = x[r] @ w[e]``, or the sum of two such products.

Legend: R rows, K and N the matrix dims, E experts.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.triton import device
from moesaic.ops.triton.configs import Config, Launch, choose
from moesaic.ops.triton.maps import Groups, TileMap, tile_map
from moesaic.ops.triton.pairs import as_pair, can_pair
from moesaic.ops.triton.tiles import (
    Matrices,
    Rows,
    add_product,
    as_rows,
    as_weight,
    layout,
    load_tile,
    ordered,
    precision,
    rows_have_descriptor,
    tile_rows,
    weight_form,
)


class Product(NamedTuple):
    """Rows ``[R, K]`` and the weights ``[E, K, N]`` that they meet."""

    x: Tensor
    w: Tensor


def grouped_mm(product: Product, groups: Groups, out_dtype: torch.dtype, *, plus: Product | None = None) -> Tensor:
    """``[R, N]``; zero in rows without expert. ``plus`` is a second product of the same shape, added in fp32."""
    x_RK, w_EKN = product
    R, K, N = *x_RK.shape, w_EKN.shape[2]
    y_RN = x_RK.new_empty(R, N, dtype=out_dtype)
    if y_RN.numel() == 0:
        return y_RN

    def run(config: Config) -> None:
        _launch(product, plus or product, plus is not None, tile_map(groups, config.BM), config, y_RN)

    second = {} if plus is None else {"x2": layout(plus.x), "w2": layout(plus.w)}
    compiled_for = {"y": out_dtype, "x": layout(x_RK), "w": layout(w_EKN), **second}
    gpu = device.describe(x_RK.device)
    operands = (product,) if plus is None else (product, plus)
    by_descriptor = all(rows_have_descriptor(p.x, gpu) and weight_form(p.w, gpu) > 0 for p in operands)
    # Triton 3.6 cannot specialize two loops after each other, and fp32 results leave no shared memory for the buffers.
    in_one_loop = plus is None or (can_pair(x_RK, plus.x) and can_pair(w_EKN, plus.w))
    can_specialize = by_descriptor and in_one_loop and out_dtype != torch.float32
    launch = Launch(
        "matmul", x_RK, K, N, groups, compiled_for, by_descriptor=by_descriptor, can_specialize=can_specialize
    )
    run(choose(launch, run))
    return y_RN


def _launch(first: Product, second: Product, is_sum: bool, tiles: TileMap, config: Config, y_RN: Tensor) -> None:
    K, N = first.w.shape[1:]
    gpu = device.describe(first.x.device)
    w = as_weight(first.w, config.BK, config.BN, gpu)
    w2 = as_weight(second.w, config.BK, config.BN, gpu)
    x, x2 = (as_rows(product.x, config.BM, config.BK, gpu) for product in (first, second))
    has_tma = x is not None and x2 is not None
    operands = x if has_tma else first.x, w.data, x2 if has_tma else second.x, w2.data
    x_first = w_first = 0
    if is_sum and config.specialized:
        x_pair = as_pair(first.x, second.x, [config.BM, config.BK])
        matrices = (first.w, second.w) if w.form == 1 else (first.w.mT, second.w.mT)
        w_pair = as_pair(*matrices, w.data.block_shape)
        operands = x_pair.data, w_pair.data, x_pair.data, w_pair.data
        x_first, w_first = x_pair.first, w_pair.first
    pieces = tiles.tiles.shape[0] * triton.cdiv(N, config.BN)
    _grouped_mm_kernel[config.grid(gpu.num_sms, pieces)](
        *operands,
        y_RN,
        tiles.tiles,
        tiles.number,
        K,
        N,
        *first.x.stride(),
        *w.strides,
        *second.x.stride(),
        *w2.strides,
        y_RN.stride(0),
        x_first,
        w_first,
        IS_SUM=is_sum,
        FORM=w.form,
        FORM2=w2.form,
        ROWS=2 if has_tma else K % config.BK == 0,
        SPECIALIZED=config.specialized,
        PRECISION=precision(first.x.dtype),
        **config.options(),
    )


class _Pairs(NamedTuple):
    """Within a kernel: descriptors of the rows and of the weights of two products, the place of the first in each."""

    x: Any
    x_first: Any
    w: Any
    w_first: Any
    K: Any


@triton.jit(do_not_specialize=["x_first", "w_first"])
def _grouped_mm_kernel(
    x,
    w,
    x2,
    w2,
    y,
    tiles,
    count,
    K,
    N,
    stride_xr,
    stride_xk,
    stride_we,
    stride_wk,
    stride_wn,
    stride_x2r,
    stride_x2k,
    stride_w2e,
    stride_w2k,
    stride_w2n,
    stride_yr,
    x_first,
    w_first,
    IS_SUM: tl.constexpr,
    FORM: tl.constexpr,
    FORM2: tl.constexpr,
    ROWS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_tiles = tl.load(count)
    num_columns = tl.cdiv(N, BN)
    num_pieces = num_tiles * num_columns
    for work in tl.range(tl.program_id(0), num_pieces, tl.num_programs(0), warp_specialize=SPECIALIZED):
        tile, column = ordered(work, num_tiles, num_columns, GROUP_M)
        expert, first, end = load_tile(tiles, tile)
        acc = tl.zeros((BM, BN), tl.float32)
        if IS_SUM and SPECIALIZED:
            pairs = _Pairs(x, x_first, w, w_first, K)
            acc = _add_pairs(acc, pairs, expert, first, column * BN, FORM, PRECISION, BM, BN, BK)
        else:
            if ROWS == 2:
                rows, rows2 = Rows(x, 0, K, first), Rows(x2, 0, K, first)
            else:
                row = tile_rows(first, end, BM).to(tl.int64)
                rows = Rows(x + row * stride_xr, stride_xk, K)
                rows2 = Rows(x2 + row * stride_x2r, stride_x2k, K)
            matrices = Matrices(w, stride_we, stride_wk, stride_wn, K, N)
            acc = add_product(acc, rows, matrices, expert, column * BN, FORM, ROWS, PRECISION, BN, BK)
            if IS_SUM:
                matrices = Matrices(w2, stride_w2e, stride_w2k, stride_w2n, K, N)
                acc = add_product(acc, rows2, matrices, expert, column * BN, FORM2, ROWS, PRECISION, BN, BK)
        out_rows = first + tl.arange(0, BM)
        columns = column * BN + tl.arange(0, BN)
        pointers = y + (out_rows.to(tl.int64) * stride_yr)[:, None] + columns[None, :]
        tl.store(pointers, acc.to(y.dtype.element_ty), mask=(out_rows < end)[:, None] & (columns < N)[None, :])


@triton.jit
def _add_pairs(
    acc,
    pairs,
    expert,
    row,
    n,
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``acc`` and both products, the first before the second, in one loop."""
    steps = tl.where(expert >= 0, tl.cdiv(pairs.K, BK), 0)
    for step in tl.range(0, 2 * steps):
        second = (step >= steps).to(tl.int32)
        k = (step - second * steps) * BK
        a = pairs.x.load([second ^ pairs.x_first, row, k]).reshape(BM, BK)
        if FORM == 1:
            b = pairs.w.load([second ^ pairs.w_first, expert, k, n]).reshape(BK, BN)
        else:
            b = pairs.w.load([second ^ pairs.w_first, expert, n, k]).reshape(BN, BK).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
