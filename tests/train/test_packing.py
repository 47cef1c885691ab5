"""Rows of several conversations: all of each, none seeing another."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moesaic.parallel import build_meshes
from moesaic.train.errors import UserError
from moesaic.train.loader import IGNORED, BatchLoader
from moesaic.train.packing import Conversations, PackedRows, check_apart, pack
from tests.train.chats import FAMILIES, write_model


@given(st.lists(st.integers(1, 9), max_size=40))
def test_every_item_is_in_one_row_and_fits(lengths):
    rows = pack(lengths, 9)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 9 for row in rows)
    # Of two rows that are both half empty one would not be there.
    assert sum(2 * sum(lengths[item] for item in row) <= 9 for row in rows) <= 1


def _conversations(lengths):
    """Token 100 i + j is number j of conversation i; every other one is learned."""
    tokens = [np.arange(length, dtype=np.uint16) + 100 * i for i, length in enumerate(lengths)]
    return Conversations(np.concatenate(tokens), np.concatenate(tokens) % 2 == 1, np.cumsum(lengths))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(2, 9), st.booleans())
def test_every_target_is_there_once_after_its_input(lengths, seq_len, packed):
    rows = PackedRows(_conversations(lengths), seq_len, packed=packed, pad_id=7777)
    found = []
    for index in range(len(rows)):
        row = rows.row(index)
        learned = row.targets != IGNORED
        assert rows.num_targets(index) == learned.sum() > 0
        assert (row.targets[learned] == row.inputs[learned] + 1).all()
        # Where it is in its conversation, padding being one of its own.
        real = row.inputs != 7777
        assert (row.positions[real] == row.inputs[real] % 100).all()
        assert (row.mask == real).all()
        found += row.targets[learned].tolist()
    kept = [100 * i + j for i, length in enumerate(lengths) for j in range(1, min(length, seq_len + 1), 2)]
    assert sorted(found) == kept
    assert rows.cut == sum(length > seq_len + 1 for length in lengths)
    assert rows.left_out == sum(length < 2 for length in lengths)
    assert packed or len(rows) == len(lengths) - rows.left_out


def test_a_batch_counts_the_targets_of_all_ranks():
    rows = PackedRows(_conversations([2, 5, 9, 4]), 9, packed=False, pad_id=0)
    parts = [BatchLoader(rows, batch_size=4, seed=0, dp_rank=rank, dp_size=2).next_batch() for rank in range(2)]
    assert parts[0].num_targets == parts[1].num_targets == sum(int((p.targets != IGNORED).sum()) for p in parts)
    assert parts[0].num_targets == 1 + 2 + 4 + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_leak_is_noticed(tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path, family))
    options = {"vocab_size": 300, "device": torch.device("cpu")}
    check_apart(model, build_meshes(), **options)
    assert not model.training

    def forget(module, args, kwargs):
        return args, kwargs | {"position_ids": torch.arange(16).expand(2, 16)}

    model.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(UserError, match="conversations that share a row would see one another in .*--no-packing"):
        check_apart(model, build_meshes(), **options)
