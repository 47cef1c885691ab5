"""The sum over an expert's rows of outer products: ``gw[e] = x[rows].T @ grad[rows]``.

The rows of an expert that has very many are cut into chunks with a sum each, in fp32, which are added in order
afterwards where there are any: the work is spread, and the bits are the same every time. The longest groups come first.

Legend: R rows, K and N the matrix dims, E experts.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.triton import device
from moesaic.ops.triton.configs import Config, Launch, choose
from moesaic.ops.triton.device import Device
from moesaic.ops.triton.maps import ChunkMap, Groups, chunk_map, expert_segment
from moesaic.ops.triton.tiles import as_rows, layout, ordered, precision

_MOST_CHUNKS = 8
_REDUCED = 1024
# Programs a multiprocessor that add partial sums.
_ADDING = 4


def weight_grad(
    x: Tensor,
    grad: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    *,
    x_rows: Tensor | None = None,
    grad_rows: Tensor | None = None,
) -> Tensor:
    """``[E, K, N]``; zero for an expert without rows. With ``x_rows`` row r is ``x[x_rows[r]]``; likewise grad."""
    gw_EKN = x.new_empty(groups.num_experts, x.shape[1], grad.shape[1], dtype=dtype)
    weight_grad_into(gw_EKN, x, grad, groups, x_rows=x_rows, grad_rows=grad_rows, adds=False)
    return gw_EKN


def weight_grad_into(
    into_EKN: Tensor,
    x: Tensor,
    grad: Tensor,
    groups: Groups,
    *,
    x_rows: Tensor | None = None,
    grad_rows: Tensor | None = None,
    adds: bool = True,
) -> None:
    """Add it to a contiguous tensor of the operands' dtype or fp32, or write it there.

    Where it is added, an expert without rows keeps its values.
    """
    _, K, N = into_EKN.shape
    if into_EKN.numel() == 0 or groups.num_rows == 0:
        if not adds:
            into_EKN.zero_()
        return

    def run_elsewhere(config: Config) -> None:
        # The tuner runs it many times.
        into = torch.empty_like(into_EKN) if adds else into_EKN
        _launch(x, grad, groups, config, into, x_rows, grad_rows, accumulate=adds)

    compiled_for = {"into": into_EKN.dtype, "x": layout(x), "grad": layout(grad)}
    compiled_for |= {"gathers x": x_rows is not None, "gathers grad": grad_rows is not None}
    gathers = x_rows is not None or grad_rows is not None
    config = choose(Launch("weight_grad", x, K, N, groups, compiled_for, gathers, adds), run_elsewhere)
    _launch(x, grad, groups, config, into_EKN, x_rows, grad_rows, accumulate=adds)


def rows_per_chunk(num_rows: int, num_blocks: int, config: Config, gpu: Device) -> int:
    """All rows, where an expert's gradient has blocks for all multiprocessors; else less, a multiple of a step."""
    if num_blocks >= gpu.num_sms:
        return num_rows
    chunks = min(triton.cdiv(2 * gpu.num_sms, num_blocks), _MOST_CHUNKS)
    return triton.cdiv(triton.cdiv(num_rows, chunks), config.BK) * config.BK


def _launch(
    x: Tensor,
    grad: Tensor,
    groups: Groups,
    config: Config,
    gw_EKN: Tensor,
    x_rows: Tensor | None,
    grad_rows: Tensor | None,
    accumulate: bool = False,
) -> None:
    _, K, N = gw_EKN.shape
    gpu = device.describe(x.device)
    num_blocks = triton.cdiv(K, config.BM) * triton.cdiv(N, config.BN)
    size = rows_per_chunk(groups.num_rows, num_blocks, config, gpu)
    chunks = chunk_map(groups, size)
    is_split = size < groups.num_rows
    partial_SKN = gw_EKN.new_empty(chunks.num_slots if is_split else 0, K, N, dtype=torch.float32)
    # Rows that are gathered have no descriptor. Where others have one, 10.0 runs out of registers.
    describes = gpu.is_sm90
    x_blocks = as_rows(x, config.BK, config.BM, gpu) if describes and x_rows is None else None
    grad_blocks = as_rows(grad, config.BK, config.BN, gpu) if describes and grad_rows is None else None
    _weight_grad_kernel[config.grid(gpu.num_sms, chunks.chunks.shape[0] * num_blocks)](
        x,
        grad,
        x if x_rows is None else x_rows,
        grad if grad_rows is None else grad_rows,
        x if x_blocks is None else x_blocks,
        grad if grad_blocks is None else grad_blocks,
        gw_EKN,
        partial_SKN,
        groups.bounds,
        chunks.chunks,
        chunks.number,
        groups.bounds.shape[1] - 2,
        groups.bounds.shape[0] if groups.is_shared else 1,
        K,
        N,
        *x.stride(),
        *grad.stride(),
        GATHER_X=x_rows is not None,
        GATHER_GRAD=grad_rows is not None,
        TMA_X=x_blocks is not None,
        TMA_GRAD=grad_blocks is not None,
        IS_SHARED=groups.is_shared,
        IS_SPLIT=is_split,
        EVEN=K % config.BM == 0 and N % config.BN == 0,
        ACCUMULATE=accumulate,
        PRECISION=precision(x.dtype),
        **config.options(),
    )
    if is_split:
        _add_partials(partial_SKN, chunks, gw_EKN, accumulate, gpu)


def _add_partials(partial_SKN: Tensor, chunks: ChunkMap, gw_EKN: Tensor, accumulate: bool, gpu: Device) -> None:
    size = gw_EKN.shape[1] * gw_EKN.shape[2]
    pieces = chunks.splits.shape[0] * triton.cdiv(size, _REDUCED)
    # Where no expert is split, which the device alone knows, these few programs end at once.
    _add_partials_kernel[(min(_ADDING * gpu.num_sms, pieces),)](
        partial_SKN, chunks.splits, chunks.num_splits, gw_EKN, size, ACCUMULATE=accumulate, BLOCK=_REDUCED
    )


class _Operand(NamedTuple):
    """Within the kernel: rows of a tensor, or those that ``index`` numbers, and the columns of them that are read."""

    data: Any
    index: Any
    stride_r: Any
    stride_c: Any
    columns: Any
    width: Any


@triton.jit
def _load_rows(operand, row, end, GATHER: tl.constexpr, EVEN: tl.constexpr, IS_TAIL: tl.constexpr, BK: tl.constexpr):
    """Rows ``row`` to ``row + BK``; those of a tail are zero past the end, for others' values there may be NaN."""
    rows = row + tl.arange(0, BK)
    inside = rows < end
    if GATHER:
        rows = tl.load(operand.index + rows, mask=inside, other=0) if IS_TAIL else tl.load(operand.index + rows)
    columns = operand.columns
    pointers = operand.data + (rows.to(tl.int64) * operand.stride_r)[:, None]
    pointers += (columns.to(tl.int64) * operand.stride_c)[None, :]
    if EVEN and not IS_TAIL:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif not IS_TAIL:
        return tl.load(pointers, mask=(columns < operand.width)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (columns < operand.width)[None, :], other=0.0)


@triton.jit
def _weight_grad_kernel(
    x,
    grad,
    x_rows,
    grad_rows,
    x_blocks,
    grad_blocks,
    gw,
    partial,
    bounds,
    chunks,
    count,
    G,
    segments,
    K,
    N,
    stride_xr,
    stride_xk,
    stride_gr,
    stride_gn,
    GATHER_X: tl.constexpr,
    GATHER_GRAD: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    blocks_k = tl.cdiv(K, BM)
    blocks_n = tl.cdiv(N, BN)
    num_blocks = blocks_k * blocks_n
    for work in tl.range(tl.program_id(0), tl.load(count) * num_blocks, tl.num_programs(0)):
        block_k, block_n = ordered(work % num_blocks, blocks_k, blocks_n, GROUP_M)
        chunk = chunks + work // num_blocks * 4
        expert = tl.load(chunk)
        begin, finish, slot = tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
        ks = block_k * BM + tl.arange(0, BM)
        ns = block_n * BN + tl.arange(0, BN)
        left = _Operand(x, x_rows, stride_xr, stride_xk, ks, K)
        right = _Operand(grad, grad_rows, stride_gr, stride_gn, ns, N)
        acc = tl.zeros((BM, BN), tl.float32)
        passed = begin * 0
        for segment in tl.range(0, segments):
            at = expert_segment(bounds, expert, segment, G, IS_SHARED)
            first, end = tl.load(at), tl.load(at + 1)
            # The chunk's part of the rows that the expert has in this block.
            start = first + tl.maximum(begin - passed, 0)
            stop = tl.minimum(end, first + finish - passed)
            passed += end - first
            tail = start + tl.maximum(stop - start, 0) // BK * BK
            for row in tl.range(start, tail, BK):
                if TMA_X:
                    a = x_blocks.load([row, block_k * BM])
                else:
                    a = _load_rows(left, row, stop, GATHER_X, EVEN, False, BK)
                if TMA_GRAD:
                    b = grad_blocks.load([row, block_n * BN])
                else:
                    b = _load_rows(right, row, stop, GATHER_GRAD, EVEN, False, BK)
                acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
            # Masks in the loop would cost half of its instructions.
            for row in tl.range(tail, stop, BK, num_stages=1):
                a = _load_rows(left, row, stop, GATHER_X, EVEN, True, BK)
                b = _load_rows(right, row, stop, GATHER_GRAD, EVEN, True, BK)
                acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        at = (ks.to(tl.int64) * N)[:, None] + ns[None, :]
        mask = (ks < K)[:, None] & (ns < N)[None, :]
        matrix = tl.cast(K, tl.int64) * N
        if IS_SPLIT:
            if slot >= 0:
                tl.store(partial + slot * matrix + at, acc, mask=mask)
            else:
                _finish(gw + expert * matrix + at, acc, mask & (finish > begin) if ACCUMULATE else mask, ACCUMULATE)
        else:
            _finish(gw + expert * matrix + at, acc, mask & (finish > begin) if ACCUMULATE else mask, ACCUMULATE)


@triton.jit
def _finish(pointers, acc, mask, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, acc.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _add_partials_kernel(partial, splits, count, gw, size, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    num_blocks = tl.cdiv(size, BLOCK)
    for work in tl.range(tl.program_id(0), tl.load(count) * num_blocks, tl.num_programs(0)):
        split = splits + work // num_blocks * 3
        expert, slot, number = tl.load(split), tl.load(split + 1), tl.load(split + 2)
        at = work % num_blocks * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        for i in tl.range(0, number):
            acc += tl.load(partial + (slot + i).to(tl.int64) * size + at, mask=at < size)
        _finish(gw + expert.to(tl.int64) * size + at, acc, at < size, ACCUMULATE)
