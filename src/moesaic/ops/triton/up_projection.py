"""Gather, up projections and activation in one kernel: ``a[r] = act(x[t] w1[e] + b1[e]) * (x[t] w3[e] + b3[e])``.

Rows are gathered as they are loaded, both products share them, and the activation is taken of the accumulators: neither
the gathered rows nor a product that is not saved is ever in memory.

Legend: T tokens, R rows sorted by expert, as many as lines L of pre-activations, D model dim, F hidden dim, E experts.
"""

import os
from typing import Any, NamedTuple, cast

import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.choices import shape_class
from moesaic.ops.triton import device
from moesaic.ops.triton.activation import hidden
from moesaic.ops.triton.configs import Config, Launch, choose
from moesaic.ops.triton.maps import TileMap, tile_map
from moesaic.ops.triton.routing import Routing
from moesaic.ops.triton.tiles import (
    Matrices,
    Rows,
    as_weight,
    layout,
    load_rows,
    load_tile,
    load_weight,
    ordered,
    precision,
    subtiles,
    tile_rows,
)


class Hidden(NamedTuple):
    """``a [R, F]`` in row order, pre-activations ``[L, F]`` in the order of lines, of no elements where not saved."""

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
    R, (_, D, F) = len(routing.slots), w1_EDF.shape
    h1 = x_TD.new_empty(R if save else 0, F)
    h3 = x_TD.new_empty(R if save and w3_EDF is not None else 0, F)
    hidden = Hidden(x_TD.new_empty(R, F), h1, h3)
    if hidden.a.numel() == 0:
        return hidden
    operands = _Operands(x_TD, w1_EDF, w3_EDF, b1_EF, b3_EF)

    def run(config: Config) -> None:
        _launch(operands, activation, routing, tile_map(routing.groups, config.BM), config, hidden, save)

    if _wants_warps() and _by_warps(operands, activation, routing, hidden, save):
        return hidden
    weights = {name: layout(w) for name, w in (("w1", w1_EDF), ("w3", w3_EDF)) if w is not None}
    compiled_for = {"activation": activation, "save": save, "b1": b1_EF is not None, "b3": b3_EF is not None}
    compiled_for |= {"x": layout(x_TD), **weights}
    run(choose(Launch("up_projection", x_TD, D, F, routing.groups, compiled_for), run))
    return hidden


def _wants_warps() -> bool:
    value = os.environ.get("MOESAIC_TRITON_WARPS", "0")
    if value not in ("0", "1"):
        raise ValueError(f"MOESAIC_TRITON_WARPS: got {value!r}; set it to 1 to try the kernel in Gluon, or to 0")
    return value == "1"


def _by_warps(operands: _Operands, activation: str, routing: Routing, hidden: Hidden, save: bool) -> bool:
    """Whether the kernel in Gluon takes the operands, and has computed the hidden rows."""
    from moesaic.ops.triton import warps

    x, w1, w3, b1, b3 = operands
    gpu = device.describe(x.device)
    is_many = shape_class(routing.groups.num_rows, routing.groups.num_experts) == "many"
    if not is_many or b1 is not None or b3 is not None or not warps.takes(x, w1, w3, activation, gpu):
        return False
    tiles = tile_map(routing.groups, warps.ROWS)
    warps.up_projection(x, w1, cast("Tensor", w3), routing, tiles, warps.Results(*hidden), save, gpu)
    return True


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


class _Biases(NamedTuple):
    """Within the kernel: a bias ``[F]`` for each expert."""

    data: Any
    stride_e: Any
    stride_f: Any


class _Tile(NamedTuple):
    """Within the kernel: whose rows a tile has, and where its results go.

    ``inside`` says which rows are the tile's own. ``a``, ``h1`` and ``h3`` point to the first element of each row.
    """

    expert: Any
    inside: Any
    F: Any
    b1: Any
    b3: Any
    a: Any
    h1: Any
    h3: Any


@triton.jit
def _with_bias(acc, biases, columns, tile):
    """The sum is rounded once, with the product. Rows without expert have no bias: they stay zero."""
    pointers = biases.data + tl.maximum(tile.expert, 0).to(tl.int64) * biases.stride_e
    pointers += columns.to(tl.int64) * biases.stride_f
    values = tl.load(pointers, mask=(columns < tile.F) & (tile.expert >= 0), other=0.0)
    return acc + values.to(tl.float32)[None, :]


@triton.jit
def _finish_columns(
    gate,
    up,
    f,
    tile,
    IS_GATED: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B3: tl.constexpr,
    SAVE: tl.constexpr,
    ACT: tl.constexpr,
    N: tl.constexpr,
):
    """Store N columns, from column ``f`` on."""
    dtype = tile.a.dtype.element_ty
    columns = f + tl.arange(0, N)
    mask = tile.inside[:, None] & (columns < tile.F)[None, :]
    if HAS_B1:
        gate = _with_bias(gate, tile.b1, columns, tile)
    # The activation is of what is saved, so that the backward pass sees the same.
    gate = gate.to(dtype)
    if SAVE:
        tl.store(tile.h1[:, None] + columns[None, :], gate, mask=mask)
    if IS_GATED:
        if HAS_B3:
            up = _with_bias(up, tile.b3, columns, tile)
        up = up.to(dtype)
        if SAVE:
            tl.store(tile.h3[:, None] + columns[None, :], up, mask=mask)
    values = hidden(gate.to(tl.float32), up.to(tl.float32), ACT, IS_GATED, dtype.primitive_bitwidth == 16)
    tl.store(tile.a[:, None] + columns[None, :], values.to(dtype), mask=mask)


@triton.jit
def _up_projection_kernel(
    x,
    tokens,
    lines,
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
    N: tl.constexpr = BN // SUBTILES
    num_tiles = tl.load(count)
    num_columns = tl.cdiv(F, BN)
    for work in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        number, column = ordered(work, num_tiles, num_columns, GROUP_M)
        expert, first, end = load_tile(tiles, number)
        row = tile_rows(first, end, BM)
        rows = Rows(x + tl.load(tokens + row).to(tl.int64) * stride_xt, stride_xd, D)
        gate_weight = Matrices(w1, stride_w1e, stride_w1d, stride_w1f, D, F)
        up_weight = Matrices(w3, stride_w3e, stride_w3d, stride_w3f, D, F)
        f = column * BN
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for d in tl.range(0, tl.where(expert >= 0, D, 0), BK):
            block = load_rows(rows, d, EVEN, BK)
            w = load_weight(gate_weight, expert, d, f, FORM1, BK, BN)
            gate = tl.dot(block, w, gate, input_precision=PRECISION)
            if IS_GATED:
                w = load_weight(up_weight, expert, d, f, FORM3, BK, BN)
                up = tl.dot(block, w, up, input_precision=PRECISION)
        out_rows = first + tl.arange(0, BM)
        line_offsets = tl.load(lines + row).to(tl.int64) * F
        tile = _Tile(
            expert,
            inside=out_rows < end,
            F=F,
            b1=_Biases(b1, stride_b1e, stride_b1f),
            b3=_Biases(b3, stride_b3e, stride_b3f),
            a=a + out_rows.to(tl.int64) * F,
            h1=h1 + line_offsets,
            h3=h3 + line_offsets,
        )
        gates, ups = subtiles(gate, BM, BN, SUBTILES), subtiles(up, BM, BN, SUBTILES)
        for i in tl.static_range(SUBTILES):
            _finish_columns(gates[i], ups[i], f + i * N, tile, IS_GATED, HAS_B1, HAS_B3, SAVE, ACT, N)
