"""Gather, up projections and activation in one kernel: ``a[r] = act(x[t] w1[e] + b1[e]) * (x[t] w3[e] + b3[e])``.

Rows are gathered as they are loaded, both products share them, and the activation is taken of the accumulators: neither
the gathered rows nor a product that is not saved is ever in memory.

Legend: T tokens, K copies a token, R rows sorted by expert, D model dim, F hidden dim, E experts.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.triton import device
from moesaic.ops.triton.activation import hidden
from moesaic.ops.triton.configs import Config, choose
from moesaic.ops.triton.maps import TileMap, tile_map
from moesaic.ops.triton.routing import Routing
from moesaic.ops.triton.tiles import as_weight, halves, load_rows, load_tile, load_weight, ordered, precision, tile_rows


class Hidden(NamedTuple):
    """``a [R, F]`` in row order, pre-activations ``[T, K, F]`` in slot order, of no elements where not saved."""

    a: Tensor
    h1: Tensor
    h3: Tensor


class _Operands(NamedTuple):
    x_TD: Tensor
    w1_EDF: Tensor
    w3_EDF: Tensor | None
    b1_EF: Tensor | None
    b3_EF: Tensor | None


def up_projection(
    x_TD: Tensor,
    w1_EDF: Tensor,
    w3_EDF: Tensor | None,
    b1_EF: Tensor | None,
    b3_EF: Tensor | None,
    activation: str,
    routing: Routing,
    save: bool,
) -> Hidden:
    """The hidden rows. Pre-activations of copies that are not here are zero."""
    (T, K), (_, D, F) = routing.positions.shape, w1_EDF.shape
    kept = (T, K, F)
    h1 = x_TD.new_empty(kept if save else (0, K, F))
    h3 = x_TD.new_empty(kept if save and w3_EDF is not None else (0, K, F))
    hidden = Hidden(x_TD.new_empty(T * K, F), h1, h3)
    if hidden.a.numel() == 0:
        return hidden
    operands = _Operands(x_TD, w1_EDF, w3_EDF, b1_EF, b3_EF)

    def run(config: Config) -> None:
        _launch(operands, activation, routing, tile_map(routing.groups, config.BM), config, hidden, save)

    run(choose("up_projection", x_TD, K=D, N=F, groups=routing.groups, run=run))
    return hidden


def _launch(
    operands: _Operands,
    activation: str,
    routing: Routing,
    tiles: TileMap,
    config: Config,
    hidden: Hidden,
    save: bool,
) -> None:
    x, w1, w3, b1, b3 = operands
    D, F = w1.shape[1:]
    gpu = device.describe(x.device)
    gate = as_weight(w1, config.BK, config.BN, gpu)
    up = gate if w3 is None else as_weight(w3, config.BK, config.BN, gpu)
    # What is not given is never loaded; a kernel takes some tensor in its place.
    bias1, bias3 = (x.new_empty(0, 0) if b is None else b for b in (b1, b3))
    pieces = tiles.tiles.shape[0] * triton.cdiv(F, config.BN)
    _up_projection_kernel[config.grid(gpu.num_sms, pieces)](
        x,
        routing.tokens,
        routing.slots,
        gate.data,
        up.data,
        bias1,
        bias3,
        hidden.a,
        hidden.h1,
        hidden.h3,
        tiles.tiles,
        tiles.number,
        D,
        F,
        *x.stride(),
        *gate.strides,
        *up.strides,
        *bias1.stride(),
        *bias3.stride(),
        IS_GATED=w3 is not None,
        HAS_B1=b1 is not None,
        HAS_B3=b3 is not None,
        SAVE=save,
        ACT=activation,
        SUBTILES=4 if config.BN >= 64 else 1,
        FORM1=gate.form,
        FORM3=up.form,
        EVEN=D % config.BK == 0,
        PRECISION=precision(x.dtype),
        **config.options(),
    )


@triton.jit
def _with_bias(acc, bias, expert, columns, F, stride_e, stride_f):
    """The sum is rounded once, with the product. Rows without expert have no bias: they stay zero."""
    pointers = bias + tl.maximum(expert, 0).to(tl.int64) * stride_e + columns.to(tl.int64) * stride_f
    return acc + tl.load(pointers, mask=(columns < F) & (expert >= 0), other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish_columns(
    gate,
    up,
    f,
    F,
    expert,
    inside,
    b1,
    b3,
    h1_rows,
    h3_rows,
    out_rows,
    stride_b1e,
    stride_b1f,
    stride_b3e,
    stride_b3f,
    IS_GATED: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B3: tl.constexpr,
    SAVE: tl.constexpr,
    ACT: tl.constexpr,
    N: tl.constexpr,
):
    """Store N columns, from column ``f`` on."""
    dtype = out_rows.dtype.element_ty
    columns = f + tl.arange(0, N)
    mask = inside[:, None] & (columns < F)[None, :]
    if HAS_B1:
        gate = _with_bias(gate, b1, expert, columns, F, stride_b1e, stride_b1f)
    # The activation is of what is saved, so that the backward pass sees the same.
    gate = gate.to(dtype)
    if SAVE:
        tl.store(h1_rows[:, None] + columns[None, :], gate, mask=mask)
    if IS_GATED:
        if HAS_B3:
            up = _with_bias(up, b3, expert, columns, F, stride_b3e, stride_b3f)
        up = up.to(dtype)
        if SAVE:
            tl.store(h3_rows[:, None] + columns[None, :], up, mask=mask)
    values = hidden(gate.to(tl.float32), up.to(tl.float32), ACT, IS_GATED)
    tl.store(out_rows[:, None] + columns[None, :], values.to(dtype), mask=mask)


@triton.jit
def _up_projection_kernel(
    x,
    tokens,
    slots,
    w1,
    w3,
    b1,
    b3,
    a,
    h1,
    h3,
    tiles,
    count,
    D,
    F,
    stride_xt,
    stride_xd,
    stride_w1e,
    stride_w1d,
    stride_w1f,
    stride_w3e,
    stride_w3d,
    stride_w3f,
    stride_b1e,
    stride_b1f,
    stride_b3e,
    stride_b3f,
    IS_GATED: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B3: tl.constexpr,
    SAVE: tl.constexpr,
    ACT: tl.constexpr,
    SUBTILES: tl.constexpr,
    FORM1: tl.constexpr,
    FORM3: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_tiles = tl.load(count)
    num_columns = tl.cdiv(F, BN)
    for work in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        tile, column = ordered(work, num_tiles, num_columns, GROUP_M)
        expert, first, end = load_tile(tiles, tile)
        rows = tile_rows(first, end, BM)
        row_pointers = x + tl.load(tokens + rows).to(tl.int64) * stride_xt
        f = column * BN
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for d in tl.range(0, tl.where(expert >= 0, D, 0), BK):
            block = load_rows(row_pointers, d, D, stride_xd, EVEN, BK)
            w = load_weight(w1, expert, d, f, D, F, stride_w1e, stride_w1d, stride_w1f, FORM1, BK, BN)
            gate = tl.dot(block, w, gate, input_precision=PRECISION)
            if IS_GATED:
                w = load_weight(w3, expert, d, f, D, F, stride_w3e, stride_w3d, stride_w3f, FORM3, BK, BN)
                up = tl.dot(block, w, up, input_precision=PRECISION)
        inside = first + tl.arange(0, BM) < end
        slot_offsets = tl.load(slots + rows).to(tl.int64) * F
        h1_rows, h3_rows = h1 + slot_offsets, h3 + slot_offsets
        out_rows = a + (first + tl.arange(0, BM)).to(tl.int64) * F
        if SUBTILES == 4:
            gate0, gate1 = halves(gate, BM, BN)
            up0, up1 = halves(up, BM, BN)
            gate00, gate01 = halves(gate0, BM, BN // 2)
            up00, up01 = halves(up0, BM, BN // 2)
            gate10, gate11 = halves(gate1, BM, BN // 2)
            up10, up11 = halves(up1, BM, BN // 2)
            _finish_columns(
                gate00, up00, f, F, expert, inside, b1, b3, h1_rows, h3_rows, out_rows,
                stride_b1e, stride_b1f, stride_b3e, stride_b3f, IS_GATED, HAS_B1, HAS_B3, SAVE, ACT, BN // 4,
            )  # fmt: skip
            _finish_columns(
                gate01, up01, f + BN // 4, F, expert, inside, b1, b3, h1_rows, h3_rows, out_rows,
                stride_b1e, stride_b1f, stride_b3e, stride_b3f, IS_GATED, HAS_B1, HAS_B3, SAVE, ACT, BN // 4,
            )  # fmt: skip
            _finish_columns(
                gate10, up10, f + BN // 2, F, expert, inside, b1, b3, h1_rows, h3_rows, out_rows,
                stride_b1e, stride_b1f, stride_b3e, stride_b3f, IS_GATED, HAS_B1, HAS_B3, SAVE, ACT, BN // 4,
            )  # fmt: skip
            _finish_columns(
                gate11, up11, f + BN // 4 * 3, F, expert, inside, b1, b3, h1_rows, h3_rows, out_rows,
                stride_b1e, stride_b1f, stride_b3e, stride_b3f, IS_GATED, HAS_B1, HAS_B3, SAVE, ACT, BN // 4,
            )  # fmt: skip
        else:
            _finish_columns(
                gate, up, f, F, expert, inside, b1, b3, h1_rows, h3_rows, out_rows,
                stride_b1e, stride_b1f, stride_b3e, stride_b3f, IS_GATED, HAS_B1, HAS_B3, SAVE, ACT, BN,
            )  # fmt: skip
