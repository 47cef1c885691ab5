"""Token copies sorted by expert, on the device: what the kernels of experts_mlp are told of a routing.

A counting sort in three launches, none of which waits for the device or uses atomics: how many copies of each expert a
block of slots has; where these go; and each slot's row. It is stable, so the order, and with it every rounding error,
depends on the routing alone.

Legend: T tokens, K copies a token (top-k), R = T * K rows sorted by expert, E experts, NB blocks of slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.triton.maps import Groups

# Slots a block, and as many of them as a program places; blocks that are counted at a time.
_BLOCK = 1024
_STEP = 64
_BLOCKS = 16
# Of a histogram.
_LEAST_BINS = 32


class Routing(NamedTuple):
    """Slot ``t * K + k`` is copy ``k`` of token ``t``. Rows of copies that are not here come last.

    Attributes:
        slots: ``[R]`` int32, the slot of each row.
        tokens: ``[R]`` int32, the token of each row.
        positions: ``[T, K]`` int32, the row of each slot, -1 for a copy that is not here.
        groups: where the rows of each expert lie.
    """

    slots: Tensor
    tokens: Tensor
    positions: Tensor
    groups: Groups


def route(ids_TK: Tensor, num_experts: int) -> Routing:
    """Sort stably by expert."""
    (T, K), E, R = ids_TK.shape, num_experts, ids_TK.numel()
    new = ids_TK.new_empty
    slots, tokens, positions = (new(shape, dtype=torch.int32) for shape in (R, R, (T, K)))
    bounds = new(1, E + 2, dtype=torch.int32)
    if R == 0:
        return Routing(slots, tokens, positions, Groups(bounds.zero_(), E, False, 0))
    ids = ids_TK.contiguous()
    num_blocks = triton.cdiv(R, _BLOCK)
    counts, starts = (new(num_blocks, E + 1, dtype=torch.int32) for _ in range(2))
    bins = max(triton.next_power_of_2(E + 1), _LEAST_BINS)
    _count_kernel[(num_blocks,)](ids, counts, R, E, BINS=bins, BLOCK=_BLOCK)
    _place_blocks_kernel[(E + 1,)](counts, starts, bounds, R, E, num_blocks, BINS=bins, BLOCKS=_BLOCKS)
    grid = (num_blocks, triton.cdiv(min(R, _BLOCK), _STEP))
    _place_kernel[grid](ids, starts, slots, tokens, positions, R, K, E, BLOCK=_BLOCK, STEP=_STEP)
    return Routing(slots, tokens, positions, Groups(bounds, E, False, R))


@triton.jit
def _load_experts(ids, slots, R, E):
    """The expert of each slot, E for a copy that is not here, and E + 1 past the last slot."""
    ids = tl.load(ids + slots, mask=slots < R, other=-1)
    experts = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(slots < R, experts, E + 1)


@triton.jit
def _count_kernel(ids, counts, R, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    experts = _load_experts(ids, slots, R, E)
    bins = tl.arange(0, BINS)
    found = tl.histogram(experts, BINS, mask=experts <= E)
    tl.store(counts + block * (E + 1) + bins, found, mask=bins <= E)


@triton.jit
def _place_blocks_kernel(counts, starts, bounds, R, E, num_blocks, BINS: tl.constexpr, BLOCKS: tl.constexpr):
    """Of one expert: where its rows begin, and where those of each block do."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    start = tl.zeros((), tl.int32)
    for b in tl.range(0, num_blocks, BLOCKS):
        blocks = b + tl.arange(0, BLOCKS)
        mask = (blocks < num_blocks)[:, None] & (bins < expert)[None, :]
        before = tl.load(counts + (blocks * (E + 1))[:, None] + bins[None, :], mask=mask, other=0)
        start += tl.sum(tl.sum(before, 1), 0)
    tl.store(bounds + expert, start)
    if expert == E:
        tl.store(bounds + E + 1, R)
    for b in tl.range(0, num_blocks, BINS):
        blocks = b + bins
        at = blocks * (E + 1) + expert
        own = tl.load(counts + at, mask=blocks < num_blocks, other=0)
        tl.store(starts + at, start + tl.cumsum(own, 0) - own, mask=blocks < num_blocks)
        start += tl.sum(own, 0)


@triton.jit
def _place_kernel(ids, starts, slots, tokens, positions, R, K, E, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The row of a slot: where those of its expert and block begin, and after the same expert's earlier slots."""
    block = tl.program_id(0)
    own = block * BLOCK + tl.program_id(1) * STEP + tl.arange(0, STEP)
    experts = _load_experts(ids, own, R, E)
    row = tl.load(starts + block * (E + 1) + experts, mask=own < R, other=0)
    for first in tl.range(block * BLOCK, block * BLOCK + (tl.program_id(1) + 1) * STEP, STEP):
        others = first + tl.arange(0, STEP)
        theirs = _load_experts(ids, others, R, E)
        is_before = (theirs[None, :] == experts[:, None]) & (others[None, :] < own[:, None])
        row += tl.sum(is_before.to(tl.int32), 1)
    mask = own < R
    tl.store(slots + row, own, mask=mask)
    tl.store(tokens + row, own // K, mask=mask)
    tl.store(positions + own, tl.where(experts < E, row, -1), mask=mask)
