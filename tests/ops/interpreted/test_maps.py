"""Maps from tiles to groups, against plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.ops.triton import available
from tests.ops.strategies import layout, layouts

maps = available.load("maps")


def expected_groups(lay):
    """``(expert, first, end)`` of every group, and of the rows past the last of each block with expert -1."""
    groups = []
    for b, sizes in enumerate(lay.sizes):
        start = b * lay.capacity
        for g, size in enumerate(sizes):
            expert = g if lay.form == "shared" else b * lay.num_groups + g
            groups.append((expert if expert < lay.num_weights else -1, start, start + size))
            start += size
        groups.append((-1, start, (b + 1) * lay.capacity))
    return groups


def make(lay, dtype=torch.int64):
    sizes = lay.tensor(dtype)
    sizes = sizes if sizes.ndim == 2 else sizes.unsqueeze(0)
    return maps.group_bounds(sizes, lay.num_rows, lay.num_weights)


@settings(max_examples=12)
@given(lay=layouts(), rows_per_tile=st.sampled_from((1, 16, 64)), dtype=st.sampled_from((torch.int32, torch.int64)))
def test_tiles(lay, rows_per_tile, dtype):
    made = maps.tile_map(make(lay, dtype), rows_per_tile)
    expected, firsts = [], []
    for expert, first, end in expected_groups(lay):
        firsts.append(len(expected))
        expected += [[expert, r, min(r + rows_per_tile, end)] for r in range(first, end, rows_per_tile)]
    assert made.number.item() == len(expected)
    assert made.firsts.tolist() == [*firsts, len(expected)]
    assert made.tiles[: len(expected)].tolist() == expected


@settings(max_examples=12)
@given(lay=layouts(), rows_per_chunk=st.sampled_from((1, 3, 16, 200)))
def test_chunks(lay, rows_per_chunk):
    made = maps.chunk_map(make(lay), rows_per_chunk)
    expected, splits, slots = [], [], 0
    # The longest first, and of those with as many rows the first.
    for expert in sorted(range(lay.num_weights), key=lambda expert: -lay.experts.count(expert)):
        rows = lay.experts.count(expert)
        pieces = [(r, min(r + rows_per_chunk, rows)) for r in range(0, rows, rows_per_chunk)] or [(0, 0)]
        is_split = len(pieces) > 1
        expected += [[expert, *piece, slots + i if is_split else -1] for i, piece in enumerate(pieces)]
        if is_split:
            splits.append([expert, slots, len(pieces)])
            slots += len(pieces)
    if lay.num_weights:
        assert made.number.item() == len(expected)
        assert made.num_splits.item() == len(splits)
    assert made.chunks[: len(expected)].tolist() == expected
    assert made.splits[: len(splits)].tolist() == splits
    assert slots <= made.num_slots


@pytest.mark.parametrize("sizes", [[[5, 9], [-1, 2]], [[2**40, 3], [0, 2**31]]])
def test_sizes_that_do_not_fit_stay_inside_their_block(sizes):
    # Values are not checked on a GPU, but nothing outside may be read or written either.
    bounds = maps.group_bounds(torch.tensor(sizes), 14, 4).bounds
    assert (bounds.diff(dim=1) >= 0).all()
    assert bounds[:, 0].tolist() == [0, 7]
    assert bounds[:, -1].tolist() == [7, 14]


def test_maps_of_more_groups_than_a_step(monkeypatch):
    monkeypatch.setattr(maps, "_STEP", 4)
    lay = layout("own", [[0, 1, 2, 5, 0, 3], [2, 0, 0, 0, 40, 1]], slack=2)
    made = maps.tile_map(make(lay), 64)
    expected = [group for group in expected_groups(lay) if group[1] < group[2]]
    assert made.tiles[: made.number.item()].tolist() == [list(group) for group in expected]
    made = maps.chunk_map(make(lay), 64)
    longest_first = [(10, 40), (3, 5), (5, 3), (2, 2), (6, 2), (1, 1), (11, 1), (0, 0), (4, 0), (7, 0), (8, 0), (9, 0)]
    assert made.chunks[: made.number.item(), [0, 2]].tolist() == [list(pair) for pair in longest_first]
