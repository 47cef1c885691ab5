"""The up projection of many rows by groups of warps that each do one thing, for compute capability 9.x; in Gluon.

One group loads into buffers that it fills in turns: rows that are gathered by ``cp.async``, both weights by the tensor
memory accelerator. Two groups multiply 64 rows each, apply the activation and store. So a tile's end runs beside the
loads of the next, which Triton's own specialisation cannot do with rows that are gathered.

**Off by default.** Gluon has no interpreter: the kernel compiles, and its values have been compared with nothing.
``MOESAIC_TRITON_WARPS=1`` turns it on where it can run, and ``benchmarks.gpu`` compares it with the kernel that runs by
default.

Legend: T tokens, K copies a token, R rows sorted by expert, D model dim, F hidden dim, E experts.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moesaic.ops.triton.device import Device
from moesaic.ops.triton.maps import TileMap
from moesaic.ops.triton.routing import Routing
from moesaic.ops.triton.tiles import rows_have_descriptor, weight_form

ROWS = 128
"""Of a tile."""
_BM, _BN, _BK = gl.constexpr(ROWS), gl.constexpr(128), gl.constexpr(64)
_STAGES = gl.constexpr(4)
_BYTES_OF_WEIGHTS = gl.constexpr(2 * 2 * 64 * 128)
# Of the group that loads: it holds addresses only.
_LOADERS, _REGISTERS = gl.constexpr(4), gl.constexpr(56)
# Each thread that loads says when its copies are there, and one when both weights are.
_ARRIVALS = gl.constexpr(32 * 4 + 1)


class Results(NamedTuple):
    """Where results go: ``a [R, F]``, and ``h1`` and ``h3 [L, F]``, of no elements where not saved."""

    a: Tensor
    h1: Tensor
    h3: Tensor


def takes(x: Tensor, w1: Tensor, w3: Tensor | None, activation: str, gpu: Device) -> bool:
    """Whether the kernel is for these: bf16, SwiGLU without biases, whole steps of the sum, contiguous weights."""
    return (
        w3 is not None
        and gpu.is_sm90
        and x.dtype == torch.bfloat16
        and activation == "silu"
        and rows_have_descriptor(x, gpu)
        and w1.shape[1] % _BK.value == 0
        and all(weight_form(w, gpu) == 1 and w.is_contiguous() for w in (w1, w3))
    )


def up_projection(
    x: Tensor, w1: Tensor, w3: Tensor, routing: Routing, tiles: TileMap, results: Results, save: bool, gpu: Device
) -> None:
    """Write the hidden rows, and in the order of lines what the backward pass needs; ``tiles`` are of ``ROWS`` rows."""
    D, F = w1.shape[1:]
    pieces = tiles.tiles.shape[0] * triton.cdiv(F, _BN.value)
    _by_warps_kernel[(min(gpu.num_sms, pieces),)](
        x,
        x.stride(0),
        routing.tokens,
        routing.slots,
        _descriptor(w1),
        _descriptor(w3),
        *results,
        tiles.tiles,
        tiles.number,
        D,
        F,
        SAVE=save,
        num_warps=8,
    )


def _descriptor(w_EDF: Tensor) -> TensorDescriptor:
    """Of the matrices below each other: steps are whole, so no block begins in one and ends in the next."""
    block = [_BK.value, _BN.value]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(w_EDF.flatten(0, 1), block, layout)


class _Pieces(NamedTuple):
    """Within the kernel: the tiles, how many pieces there are, and columns of blocks."""

    tiles: Any
    number: Any
    columns: Any


class _Buffers(NamedTuple):
    """Within the kernel: for each stage rows, both weights, and barriers that say that it is full, or may be filled."""

    rows: Any
    gate: Any
    up: Any
    full: Any
    empty: Any


@gluon.jit
def _load(x, stride, tokens, gate, up, D, pieces, buffers):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_LOADERS, 1], [1, 0])
    step = 0
    for work in range(gl.program_id(0), pieces.number, gl.num_programs(0)):
        tile = pieces.tiles + work // pieces.columns * 3
        f = work % pieces.columns * _BN
        expert, first, end = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
        row = gl.minimum(first + gl.arange(0, _BM, gl.SliceLayout(1, layout)), end - 1)
        token = gl.load(tokens + row).to(gl.int64)
        pointers = x + (token * stride)[:, None] + gl.arange(0, _BK, gl.SliceLayout(0, layout))[None, :]
        for d in range(0, gl.where(expert >= 0, D, 0), _BK):
            s = step % _STAGES
            full = buffers.full.index(s)
            mbarrier.wait(buffers.empty.index(s), ((step // _STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(buffers.rows.index(s), pointers + d)
            async_copy.mbarrier_arrive(full, increment_count=False)
            mbarrier.expect(full, _BYTES_OF_WEIGHTS)
            tma.async_copy_global_to_shared(gate, [expert * D + d, f], full, buffers.gate.index(s))
            tma.async_copy_global_to_shared(up, [expert * D + d, f], full, buffers.up.index(s))
            step += 1


@gluon.jit
def _sigmoid(h):
    power = gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [h * -1.44269504], gl.float32, True, 1)
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], gl.float32, True, 1)


@gluon.jit
def _multiply(lines, a, h1, h3, D, F, pieces, buffers, SAVE: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, _BN, 16])
    step = 0
    for work in range(gl.program_id(0), pieces.number, gl.num_programs(0)):
        tile = pieces.tiles + work // pieces.columns * 3
        expert, first, end = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
        length = gl.where(expert >= 0, D, 0)
        gate = gl.zeros((_BM, _BN), gl.float32, layout)
        up = gl.zeros((_BM, _BN), gl.float32, layout)
        for d in range(0, length, _BK):
            s = step % _STAGES
            mbarrier.wait(buffers.full.index(s), (step // _STAGES) & 1)
            hopper.fence_async_shared()
            rows = buffers.rows.index(s)
            gate = hopper.warpgroup_mma(rows, buffers.gate.index(s), gate, is_async=True)
            up = hopper.warpgroup_mma(rows, buffers.up.index(s), up, is_async=True)
            # Where only these two are not done, the step before is, and its buffers may be filled.
            gate, up = hopper.warpgroup_mma_wait(2, deps=(gate, up))
            mbarrier.arrive(buffers.empty.index((step + _STAGES - 1) % _STAGES), count=1, pred=d > 0)
            step += 1
        gate, up = hopper.warpgroup_mma_wait(0, deps=(gate, up))
        mbarrier.arrive(buffers.empty.index((step + _STAGES - 1) % _STAGES), count=1, pred=length > 0)
        row = first + gl.arange(0, _BM, gl.SliceLayout(1, layout))
        columns = (work % pieces.columns * _BN + gl.arange(0, _BN, gl.SliceLayout(0, layout)))[None, :]
        mask = (row < end)[:, None] & (columns < F)
        # The activation is of what is saved, so that the backward pass sees the same.
        gate, up = gate.to(gl.bfloat16), up.to(gl.bfloat16)
        if SAVE:
            at = (gl.load(lines + gl.minimum(row, end - 1)).to(gl.int64) * F)[:, None] + columns
            gl.store(h1 + at, gate, mask=mask)
            gl.store(h3 + at, up, mask=mask)
        h = gate.to(gl.float32)
        hidden = h * _sigmoid(h) * up.to(gl.float32)
        gl.store(a + (row.to(gl.int64) * F)[:, None] + columns, hidden.to(gl.bfloat16), mask=mask)


@gluon.jit
def _by_warps_kernel(x, stride, tokens, lines, gate, up, a, h1, h3, tiles, count, D, F, SAVE: gl.constexpr):
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BM, _BK], gl.bfloat16)
    of_barriers: gl.constexpr = mbarrier.MBarrierLayout()
    buffers = _Buffers(
        rows=gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _BM, _BK], of_rows),
        gate=gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _BK, _BN], gate.layout),
        up=gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _BK, _BN], up.layout),
        full=gl.allocate_shared_memory(gl.int64, [_STAGES, 1], of_barriers),
        empty=gl.allocate_shared_memory(gl.int64, [_STAGES, 1], of_barriers),
    )
    for i in gl.static_range(_STAGES):
        mbarrier.init(buffers.full.index(i), count=_ARRIVALS)
        mbarrier.init(buffers.empty.index(i), count=1)
    columns = gl.cdiv(F, _BN)
    pieces = _Pieces(tiles, gl.load(count) * columns, columns)
    gl.warp_specialize(
        [
            (_multiply, (lines, a, h1, h3, D, F, pieces, buffers, SAVE)),
            (_load, (x, stride, tokens, gate, up, D, pieces, buffers)),
        ],
        [_LOADERS],
        [_REGISTERS],
    )
