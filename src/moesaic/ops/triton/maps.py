"""Which rows a program computes: maps from tiles to groups, built on the device from group sizes.

How many tiles there are is known to the device alone. Maps are made for as many as there can be, ``R / M`` and one more
a group, and carry their number along: programs loop up to it, so what is empty costs nothing.

Bounds say where groups lie: group ``g`` of block ``b`` is rows ``bounds[b, g]`` to ``bounds[b, g + 1]``, and the rows
past the last group follow as one group more, which has no expert. So its tiles are tiles like others, and write zeros.

Legend: R rows, B blocks, G groups a block, E experts, V = B * (G + 1) groups with those past the end, S tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.grouped_mm.groups import are_shared

_STEP = 1024


class Groups(NamedTuple):
    """Where the groups lie.

    Attributes:
        bounds: ``[B, G + 2]`` int32.
        num_experts: E.
        is_shared: whether the blocks share their experts.
        num_rows: R.
    """

    bounds: Tensor
    num_experts: int
    is_shared: bool
    num_rows: int


class TileMap(NamedTuple):
    """``tiles[i]``: expert (-1 for none), first row and end of tile ``i``; ``firsts[v]``: the first tile of a group.

    ``firsts[V]`` is the number of tiles.
    """

    tiles: Tensor
    firsts: Tensor

    @property
    def number(self) -> Tensor:
        return self.firsts[-1:]


class ChunkMap(NamedTuple):
    """The rows of each expert in chunks, for sums over them; the experts with the most rows come first.

    Attributes:
        chunks: ``[S, 4]``: expert, first and end among the expert's rows in all blocks, and the slot of its partial
            sum, -1 where the chunk is all there is.
        number: ``[1]``, how many chunks there are.
        splits: ``[num_splits, 3]``: of each expert with several chunks, itself, its first slot and how many slots.
        num_splits: ``[1]``, how many of them there are.
        num_slots: as many slots as there can be.
    """

    chunks: Tensor
    number: Tensor
    splits: Tensor
    num_splits: Tensor
    num_slots: int


def group_bounds(sizes_BG: Tensor, num_rows: int, num_experts: int) -> Groups:
    """From group sizes. Those that are negative or do not fit their block are cut, never read past."""
    B, G = sizes_BG.shape
    bounds = sizes_BG.new_empty(B, G + 2, dtype=torch.int32)
    if B:
        _group_bounds_kernel[(B,)](sizes_BG.contiguous(), bounds, num_rows // B, G, STEP=_STEP)
    return Groups(bounds, num_experts, are_shared(num_experts, sizes_BG), num_rows)


def tile_map(groups: Groups, rows_per_tile: int) -> TileMap:
    """Tiles of at most ``rows_per_tile`` rows, in row order."""
    B, G = groups.bounds.shape[0], groups.bounds.shape[1] - 2
    V = B * (G + 1)
    num_tiles = groups.num_rows // rows_per_tile + min(V, groups.num_rows)
    tiles = groups.bounds.new_empty(max(num_tiles, 1), 3)
    firsts = groups.bounds.new_empty(V + 1)
    _tile_map_kernel[(V,)](
        groups.bounds, tiles, firsts, G, groups.num_experts, V, groups.is_shared, M=rows_per_tile, STEP=_STEP
    )
    return TileMap(tiles, firsts)


def chunk_map(groups: Groups, rows_per_chunk: int) -> ChunkMap:
    """Chunks of at most ``rows_per_chunk`` rows, at least one an expert.

    Programs take every n-th chunk. Beginning with the longest they end at about the same time, however uneven the
    experts are.
    """
    B, G, E = groups.bounds.shape[0], groups.bounds.shape[1] - 2, groups.num_experts
    # An expert in more than one chunk has more rows than fit one, so there are at most `most` such experts.
    most = groups.num_rows // rows_per_chunk
    new = groups.bounds.new_empty
    made = ChunkMap(new(most + E, 4), new(1), new(max(most, 1), 3), new(1), 2 * most)
    _chunk_map_kernel[(E,)](
        groups.bounds,
        made.chunks,
        made.number,
        made.splits,
        made.num_splits,
        G,
        E,
        B if groups.is_shared else 1,
        groups.is_shared,
        rows_per_chunk,
        STEP=_STEP,
    )
    return made


@triton.jit
def _group_bounds_kernel(sizes, bounds, capacity, G, STEP: tl.constexpr):
    block = tl.program_id(0)
    first = block * capacity
    bounds += block * (G + 2)
    start = tl.zeros((), tl.int64)
    for g in tl.range(0, G, STEP):
        offsets = g + tl.arange(0, STEP)
        size = tl.load(sizes + block * G + offsets, mask=offsets < G, other=0).to(tl.int64)
        size = tl.minimum(tl.maximum(size, 0), capacity)
        begin = start + tl.cumsum(size, 0) - size
        tl.store(bounds + offsets, first + tl.minimum(begin, capacity).to(tl.int32), mask=offsets < G)
        start += tl.sum(size, 0)
    tl.store(bounds + G, first + tl.minimum(start, capacity).to(tl.int32))
    tl.store(bounds + G + 1, first + capacity)


@triton.jit
def _group_rows(bounds, v, G, mask):
    """First row and number of rows of groups ``v``, counted with those past the end of a block."""
    at = bounds + (v // (G + 1)) * (G + 2) + v % (G + 1)
    first = tl.load(at, mask=mask, other=0)
    return first, tl.load(at + 1, mask=mask, other=0) - first


@triton.jit
def _tile_map_kernel(bounds, tiles, firsts, G, E, V, IS_SHARED: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr):
    v = tl.program_id(0)
    tile = tl.zeros((), tl.int32)
    for u in tl.range(0, v, STEP):
        before = u + tl.arange(0, STEP)
        _, size = _group_rows(bounds, before, G, before < v)
        tile += tl.sum(tl.cdiv(size, M), 0)
    first, size = _group_rows(bounds, v, G, v < V)
    group = v % (G + 1)
    expert = group if IS_SHARED else v // (G + 1) * G + group
    expert = tl.where((group < G) & (expert < E), expert, -1)
    number = tl.cdiv(size, M)
    tl.store(firsts + v, tile)
    if v == V - 1:
        tl.store(firsts + V, tile + number)
    for i in tl.range(0, number, 32):
        own = i + tl.arange(0, 32)
        mask = own < number
        at = tiles + (tile + own) * 3
        tl.store(at, own * 0 + expert, mask=mask)
        tl.store(at + 1, first + own * M, mask=mask)
        tl.store(at + 2, first + tl.minimum((own + 1) * M, size), mask=mask)


@triton.jit
def expert_segment(bounds, expert, segment, G, IS_SHARED: tl.constexpr):
    """Where the bounds of an expert are: in each block where the blocks share it, else in its own."""
    if IS_SHARED:
        return bounds + segment * (G + 2) + expert
    else:
        return bounds + expert // G * (G + 2) + expert % G


@triton.jit
def _expert_rows(bounds, expert, segments, G, mask, IS_SHARED: tl.constexpr):
    """How many rows experts have in all blocks."""
    rows = expert * 0
    for segment in tl.range(0, segments):
        at = expert_segment(bounds, expert, segment, G, IS_SHARED)
        rows += tl.load(at + 1, mask=mask, other=0) - tl.load(at, mask=mask, other=0)
    return rows


@triton.jit
def _chunk_map_kernel(
    bounds,
    chunks,
    count,
    splits,
    num_splits,
    G,
    E,
    segments,
    IS_SHARED: tl.constexpr,
    rows_per_chunk,
    STEP: tl.constexpr,
):
    expert = tl.program_id(0)
    rows = _expert_rows(bounds, expert, segments, G, expert < E, IS_SHARED)
    number = tl.maximum(tl.cdiv(rows, rows_per_chunk), 1)
    chunk = tl.zeros((), tl.int32)
    slot = tl.zeros((), tl.int32)
    split = tl.zeros((), tl.int32)
    all_chunks = tl.zeros((), tl.int32)
    all_splits = tl.zeros((), tl.int32)
    for e in tl.range(0, E, STEP):
        other = e + tl.arange(0, STEP)
        others = _expert_rows(bounds, other, segments, G, other < E, IS_SHARED)
        theirs = tl.where(other < E, tl.maximum(tl.cdiv(others, rows_per_chunk), 1), 0)
        all_chunks += tl.sum(theirs, 0)
        all_splits += tl.sum(tl.where(theirs > 1, 1, 0), 0)
        is_before = (others > rows) | ((others == rows) & (other < expert))
        chunk += tl.sum(tl.where(is_before, theirs, 0), 0)
        slot += tl.sum(tl.where(is_before & (theirs > 1), theirs, 0), 0)
        split += tl.sum(tl.where(is_before & (theirs > 1), 1, 0), 0)
    is_split = number > 1
    if expert == 0:
        tl.store(count, all_chunks)
        tl.store(num_splits, all_splits)
    if is_split:
        tl.store(splits + 3 * split, expert)
        tl.store(splits + 3 * split + 1, slot)
        tl.store(splits + 3 * split + 2, number)
    for i in tl.range(0, number, 32):
        own = i + tl.arange(0, 32)
        mask = own < number
        at = chunks + (chunk + own) * 4
        tl.store(at, own * 0 + expert, mask=mask)
        tl.store(at + 1, own * rows_per_chunk, mask=mask)
        tl.store(at + 2, tl.minimum((own + 1) * rows_per_chunk, rows), mask=mask)
        tl.store(at + 3, tl.where(is_split, slot + own, -1), mask=mask)
