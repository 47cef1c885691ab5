"""Token copies sorted by expert, on the device: what the kernels of experts_mlp are told of a routing.

A counting sort in three launches, none of which waits for the device or uses atomics: how many copies of each expert a
block of slots has; where these go; and each slot's row. It is stable, so the order, and with it every rounding error,
depends on the routing alone.

Where a call lists the copies that are here, lines of the list are sorted in the place of slots.

Legend: T tokens, K copies a token (top-k), R rows sorted by expert, as many as slots T * K or lines of a list, E
experts, NB blocks of slots or lines.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.experts_mlp.problem import Listed
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
        slots: ``[R]`` int32, the slot of each row, or with a list its line.
        tokens: ``[R]`` int32, the token of each row.
        positions: ``[T, K]`` int32, the row of each slot, -1 for a copy that is not here.
        groups: where the rows of each expert lie.
    """

    slots: Tensor
    tokens: Tensor
    positions: Tensor
    groups: Groups


def route(ids_TK: Tensor, num_experts: int, listed: Listed | None = None) -> Routing:
    """Sort stably by expert. With a list, only what is on it has a row."""
    (T, K), E = ids_TK.shape, num_experts
    R = ids_TK.numel() if listed is None else listed.slots_L.numel()
    new = ids_TK.new_empty
    lines, tokens, positions = (new(shape, dtype=torch.int32) for shape in (R, R, (T, K)))
    bounds = new(1, E + 2, dtype=torch.int32)
    if listed is not None:
        positions.fill_(-1)  # of copies that are not listed
    if R == 0:
        return Routing(lines, tokens, positions, Groups(bounds.zero_(), E, False, 0))
    ids = ids_TK.contiguous() if listed is None else listed.to_lines(ids_TK, -1)
    slots = ids if listed is None else listed.slots_L
    num_blocks = triton.cdiv(R, _BLOCK)
    counts, starts = (new(num_blocks, E + 1, dtype=torch.int32) for _ in range(2))
    bins = max(triton.next_power_of_2(E + 1), _LEAST_BINS)
    _count_kernel[(num_blocks,)](ids, counts, R, E, BINS=bins, BLOCK=_BLOCK)
    _place_blocks_kernel[(E + 1,)](counts, starts, bounds, R, E, num_blocks, BINS=bins, BLOCKS=_BLOCKS)
    grid = (num_blocks, triton.cdiv(min(R, _BLOCK), _STEP))
    # Without a token no line is of a copy, and no number is divided by.
    options = {"IS_LISTED": listed is not None, "BLOCK": _BLOCK, "STEP": _STEP}
    _place_kernel[grid](ids, slots, starts, lines, tokens, positions, R, max(K, 1), E, **options)
    return Routing(lines, tokens, positions, Groups(bounds, E, False, R))


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
def _place_kernel(
    ids,
    slots,
    starts,
    lines,
    tokens,
    positions,
    R,
    K,
    E,
    IS_LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
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
    slot = own
    if IS_LISTED:
        # A line of no copy has some token, for it has a row, which is of no expert.
        slot = tl.maximum(tl.load(slots + own, mask=mask, other=0).to(tl.int32), 0)
    tl.store(lines + row, own, mask=mask)
    tl.store(tokens + row, slot // K, mask=mask)
    if IS_LISTED:
        tl.store(positions + slot, row, mask=mask & (experts < E))
    else:
        tl.store(positions + own, tl.where(experts < E, row, -1), mask=mask)
