"""The gradient of the hidden rows, with those of the activation and of the routing weights, in one kernel.

``g[r] = grad[t] w2[e].T`` is in registers only. Of it come, with the hidden row ``a`` made again from what was saved,

- ``gh1 = weight g da/dh1`` and ``gh3 = weight g da/dh3``, rows ``[R, F]``,
- the gradient of the routing weight, ``<g, a>``: a partial sum in fp32 for each block of columns, added afterwards,
- ``weight a``, what the weight gradient of ``w2`` multiplies ``grad`` with,
- the column sums of ``gh1`` and ``gh3`` over each tile of rows, added afterwards to the gradients of the biases.

No sum is made by atomics, so the bits are the same every time.

Legend: T tokens, R rows sorted by expert, as many as lines L of pre-activations, D model dim, F hidden dim, E experts,
S tiles.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.triton import device
from moesaic.ops.triton.activation import hidden_and_slopes
from moesaic.ops.triton.configs import Config, Launch, choose
from moesaic.ops.triton.maps import TileMap, tile_map
from moesaic.ops.triton.routing import Routing
from moesaic.ops.triton.tiles import (
    Matrices,
    Rows,
    add_product,
    as_weight,
    layout,
    load_tile,
    ordered,
    precision,
    prefetch,
    subtiles,
    tile_rows,
)

_COLUMNS = 128


class Wanted(NamedTuple):
    """Which results beside the gradients of the pre-activations are wanted."""

    routing_weights: bool
    weighted: bool
    biases: bool


class HiddenGradient(NamedTuple):
    """``gh1``, ``gh3`` and ``weighted`` are ``[R, F]``, ``weights [L]`` and biases' gradients ``[E, F]`` fp32.

    What is not wanted has no elements, and ``gh3`` and ``b3`` none without gate.
    """

    gh1: Tensor
    gh3: Tensor
    weighted: Tensor
    weights: Tensor
    b1: Tensor
    b3: Tensor


class _Operands(NamedTuple):
    grad_TD: Tensor
    w2_EFD: Tensor
    h1_LF: Tensor
    h3_LF: Tensor | None
    weights_L: Tensor


def down_gradient(
    grad_TD: Tensor,
    w2_EFD: Tensor,
    h1_LF: Tensor,
    h3_LF: Tensor | None,
    weights_L: Tensor,
    activation: str,
    routing: Routing,
    wanted: Wanted,
) -> HiddenGradient:
    """The gradients. Routing weights' gradients of copies that are not here are zero."""
    (R, F), E = h1_LF.shape, w2_EFD.shape[0]
    is_gated = h3_LF is not None

    def rows(is_wanted: bool) -> Tensor:
        return grad_TD.new_empty(R if is_wanted else 0, F)

    def sums(*shape: int) -> Tensor:
        return grad_TD.new_zeros(shape, dtype=torch.float32)

    gh1, gh3, weighted = rows(True), rows(is_gated), rows(wanted.weighted)
    if gh1.numel() == 0:
        biases = (sums(E, F), sums(E, F)) if wanted.biases else (sums(0, F), sums(0, F))
        return HiddenGradient(gh1, gh3, weighted, sums(R), *biases)
    h3_LF = None if h3_LF is None else h3_LF.contiguous()
    operands = _Operands(grad_TD, w2_EFD, h1_LF.contiguous(), h3_LF, weights_L.contiguous())

    def run(config: Config) -> HiddenGradient:
        return _launch(operands, activation, routing, config, wanted, (gh1, gh3, weighted))

    compiled_for = {"activation": activation, "gated": is_gated, **wanted._asdict()}
    compiled_for |= {"grad": layout(grad_TD), "w2": layout(w2_EFD)}
    return run(choose(Launch("down_gradient", grad_TD, grad_TD.shape[1], F, routing.groups, compiled_for), run))


def _launch(
    operands: _Operands,
    activation: str,
    routing: Routing,
    config: Config,
    wanted: Wanted,
    rows: tuple[Tensor, Tensor, Tensor],
) -> HiddenGradient:
    grad, w2, h1, h3, weights = operands
    (E, F, D), L = w2.shape, weights.numel()
    gpu = device.describe(grad.device)
    w = as_weight(w2.mT, config.BK, config.BN, gpu)
    tiles = tile_map(routing.groups, config.BM)
    num_tiles, num_columns = tiles.tiles.shape[0], triton.cdiv(F, config.BN)
    partial = grad.new_empty(num_columns if wanted.routing_weights else 0, L, dtype=torch.float32)
    sums1 = grad.new_empty(num_tiles if wanted.biases else 0, F, dtype=torch.float32)
    sums3 = grad.new_empty(num_tiles if wanted.biases and h3 is not None else 0, F, dtype=torch.float32)
    _down_gradient_kernel[config.grid(gpu.num_sms, num_tiles * num_columns)](
        grad,
        routing.tokens,
        routing.slots,
        w.data,
        h1,
        h1 if h3 is None else h3,
        weights,
        *rows,
        partial,
        sums1,
        sums3,
        tiles.tiles,
        tiles.number,
        D,
        F,
        L,
        *grad.stride(),
        *w.strides,
        IS_GATED=h3 is not None,
        WANTS_ROUTING=wanted.routing_weights,
        WANTS_WEIGHTED=wanted.weighted,
        WANTS_BIASES=wanted.biases,
        ACT=activation,
        SUBTILES=4 if config.BN >= 64 else 1,
        FORM=w.form,
        EVEN=D % config.BK == 0,
        PRECISION=precision(grad.dtype),
        **config.options(),
    )
    gb1, gb3 = (_add_tiles(sums, tiles, E) for sums in (sums1, sums3))
    return HiddenGradient(*rows, partial.sum(0), gb1, gb3)


def _add_tiles(sums_SF: Tensor, tiles: TileMap, num_experts: int) -> Tensor:
    """``[E, F]``: the tiles of an expert, added in order."""
    S, F = sums_SF.shape
    total_EF = sums_SF.new_empty(num_experts if S else 0, F)
    if total_EF.numel():
        grid = (num_experts, triton.cdiv(F, _COLUMNS))
        _add_tiles_kernel[grid](sums_SF, tiles.firsts, total_EF, F, BLOCK=_COLUMNS)
    return total_EF


class _Tile(NamedTuple):
    """Within the kernel: what a tile's columns are made with, and where the results go.

    ``inside`` says which rows are the tile's own, and ``weight`` is each row's. ``sums1`` and ``sums3`` point to the
    first element of the tile's sum, the others to that of each row.
    """

    inside: Any
    weight: Any
    F: Any
    h1: Any
    h3: Any
    weighted: Any
    gh1: Any
    gh3: Any
    sums1: Any
    sums3: Any


@triton.jit
def _finish_columns(
    g,
    f,
    tile,
    IS_GATED: tl.constexpr,
    WANTS_WEIGHTED: tl.constexpr,
    WANTS_BIASES: tl.constexpr,
    ACT: tl.constexpr,
    N: tl.constexpr,
):
    """All that comes of N columns of ``g``, from column ``f`` on; gives back their part of ``<g, a>``."""
    dtype = tile.gh1.dtype.element_ty
    columns = f + tl.arange(0, N)
    is_column = columns < tile.F
    mask = tile.inside[:, None] & is_column[None, :]
    pre = tl.load(tile.h1[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    up = pre
    if IS_GATED:
        up = tl.load(tile.h3[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    hidden, slope1, slope3 = hidden_and_slopes(pre, up, ACT, IS_GATED, dtype.primitive_bitwidth == 16)
    # As the forward pass rounded it.
    hidden = hidden.to(dtype).to(tl.float32)
    sums = tl.sum(tl.where(mask, g * hidden, 0.0), 1)
    if WANTS_WEIGHTED:
        weighted = (hidden * tile.weight[:, None]).to(dtype)
        tl.store(tile.weighted[:, None] + columns[None, :], weighted, mask=mask)
    g = g * tile.weight[:, None]
    gate = (g * slope1).to(dtype)
    tl.store(tile.gh1[:, None] + columns[None, :], gate, mask=mask)
    if WANTS_BIASES:
        tl.store(tile.sums1 + columns, tl.sum(tl.where(mask, gate.to(tl.float32), 0.0), 0), mask=is_column)
    if IS_GATED:
        side = (g * slope3).to(dtype)
        tl.store(tile.gh3[:, None] + columns[None, :], side, mask=mask)
        if WANTS_BIASES:
            tl.store(tile.sums3 + columns, tl.sum(tl.where(mask, side.to(tl.float32), 0.0), 0), mask=is_column)
    return sums


@triton.jit
def _down_gradient_kernel(
    grad,
    tokens,
    lines,
    w,
    h1,
    h3,
    weights,
    gh1,
    gh3,
    weighted,
    partial,
    sums1,
    sums3,
    tiles,
    count,
    D,
    F,
    num_lines,
    stride_gt,
    stride_gd,
    stride_we,
    stride_wd,
    stride_wf,
    IS_GATED: tl.constexpr,
    WANTS_ROUTING: tl.constexpr,
    WANTS_WEIGHTED: tl.constexpr,
    WANTS_BIASES: tl.constexpr,
    ACT: tl.constexpr,
    SUBTILES: tl.constexpr,
    FORM: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    N: tl.constexpr = BN // SUBTILES
    # Elements of 128 bytes.
    CACHE_LINE: tl.constexpr = 1024 // h1.dtype.element_ty.primitive_bitwidth
    CACHE_LINES: tl.constexpr = (BN + CACHE_LINE - 1) // CACHE_LINE
    num_tiles = tl.load(count)
    num_columns = tl.cdiv(F, BN)
    for work in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        number, column = ordered(work, num_tiles, num_columns, GROUP_M)
        expert, first, end = load_tile(tiles, number)
        row = tile_rows(first, end, BM)
        rows = Rows(grad + tl.load(tokens + row).to(tl.int64) * stride_gt, stride_gd, D)
        weight = Matrices(w, stride_we, stride_wd, stride_wf, D, F)
        f = column * BN
        line = tl.load(lines + row).to(tl.int64)
        # What the end of this tile reads of memory comes while its product is computed.
        ahead = tl.minimum(f + tl.arange(0, CACHE_LINES) * CACHE_LINE, F - 1)
        prefetch((h1 + line * F)[:, None] + ahead[None, :])
        if IS_GATED:
            prefetch((h3 + line * F)[:, None] + ahead[None, :])
        g = tl.zeros((BM, BN), tl.float32)
        g = add_product(g, rows, weight, expert, f, FORM, EVEN, PRECISION, BN, BK)

        out_rows = first + tl.arange(0, BM)
        inside = out_rows < end
        out = out_rows.to(tl.int64) * F
        tile = _Tile(
            inside,
            weight=tl.load(weights + line, mask=inside & (expert >= 0), other=0.0).to(tl.float32),
            F=F,
            h1=h1 + line * F,
            h3=h3 + line * F,
            weighted=weighted + out,
            gh1=gh1 + out,
            gh3=gh3 + out,
            sums1=sums1 + number.to(tl.int64) * F,
            sums3=sums3 + number.to(tl.int64) * F,
        )
        parts = subtiles(g, BM, BN, SUBTILES)
        # A sum that starts from zeros spilled registers in one form.
        sums = _finish_columns(parts[0], f, tile, IS_GATED, WANTS_WEIGHTED, WANTS_BIASES, ACT, N)
        for i in tl.static_range(1, SUBTILES):
            sums += _finish_columns(parts[i], f + i * N, tile, IS_GATED, WANTS_WEIGHTED, WANTS_BIASES, ACT, N)
        if WANTS_ROUTING:
            tl.store(partial + column.to(tl.int64) * num_lines + line, sums, mask=inside)


@triton.jit
def _add_tiles_kernel(sums, firsts, total, F, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    end = tl.load(firsts + expert + 1)
    for tile in tl.range(tl.load(firsts + expert), end, 16):
        rows = tile + tl.arange(0, 16)
        mask = (rows < end)[:, None] & (columns < F)[None, :]
        acc += tl.sum(tl.load(sums + (rows.to(tl.int64) * F)[:, None] + columns[None, :], mask=mask, other=0.0), 0)
    tl.store(total + expert.to(tl.int64) * F + columns, acc, mask=columns < F)
