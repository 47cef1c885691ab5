"""The same global batches on any layout, and after any interruption."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.train.errors import UserError
from moesaic.train.loader import BatchLoader, Windows


@st.composite
def settings(draw):
    seq_len = draw(st.integers(2, 7))
    windows = draw(st.integers(1, 23))
    spare = draw(st.integers(0, seq_len - 1))
    tokens = np.arange(windows * seq_len + 1 + spare, dtype=np.uint16)
    batch_size = draw(st.sampled_from([1, 2, 4, 6, 12]))
    return {"tokens": tokens, "seq_len": seq_len, "batch_size": batch_size, "seed": draw(st.integers(0, 2**31))}


def _loader(values, **layout):
    values = dict(values)
    return BatchLoader(Windows(values.pop("tokens"), values.pop("seq_len")), **values, **layout)


def _windows(batch):
    """Inputs and the last target."""
    assert batch.positions is None
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    return torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)


def _divisor(data, number):
    return data.draw(st.sampled_from([n for n in range(1, number + 1) if number % n == 0]))


@given(settings(), st.data())
def test_the_ranks_together_have_the_global_batch(values, data):
    size = _divisor(data, values["batch_size"])
    whole = _loader(values)
    parts = [_loader(values, dp_rank=rank, dp_size=size) for rank in range(size)]
    for _ in range(5):
        assert torch.equal(torch.cat([_windows(part.next_batch()) for part in parts]), _windows(whole.next_batch()))


@given(settings(), st.data())
def test_an_interruption_changes_nothing_whatever_the_layouts(values, data):
    before, after = _divisor(data, values["batch_size"]), _divisor(data, values["batch_size"])
    whole = _loader(values)
    first = [_loader(values, dp_rank=rank, dp_size=before) for rank in range(before)]
    for _ in range(data.draw(st.integers(0, 8))):
        whole.next_batch()
        for part in first:
            part.next_batch()
    states = [json.loads(json.dumps(part.state_dict())) for part in first]
    assert all(state == states[0] for state in states)
    second = [_loader(values, dp_rank=rank, dp_size=after) for rank in range(after)]
    for part in second:
        part.load_state_dict(states[0])
    for _ in range(4):
        assert torch.equal(torch.cat([_windows(part.next_batch()) for part in second]), _windows(whole.next_batch()))


@given(settings())
def test_an_epoch_has_every_window_once(values):
    loader = _loader(values | {"batch_size": 1})
    rows = torch.cat([_windows(loader.next_batch()) for _ in range(len(loader.rows))])
    assert sorted(rows[:, 0].tolist()) == [window * loader.rows.seq_len for window in range(len(loader.rows))]
    # Tokens are their own positions here, so a window is a run of them.
    assert (rows == rows[:, :1] + torch.arange(loader.rows.seq_len + 1)).all()


def test_epochs_and_seeds_differ():
    tokens = np.arange(401, dtype=np.uint16)

    def order(seed, epoch):
        loader = BatchLoader(Windows(tokens, 4), batch_size=100, seed=seed)
        batches = [loader.next_batch().inputs[:, 0].tolist() for _ in range(epoch + 1)]
        return tuple(batches[epoch])

    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


def test_the_order_is_this_one_on_every_machine():
    loader = BatchLoader(Windows(np.arange(81, dtype=np.uint16), 8), batch_size=10, seed=7)
    assert (loader.next_batch().inputs[:, 0] // 8).tolist() == [4, 5, 9, 8, 1, 7, 6, 0, 2, 3]


def test_errors():
    tokens = np.arange(100, dtype=np.uint16)
    with pytest.raises(UserError, match="100 tokens, less than one window of 101"):
        Windows(tokens, 100)
    with pytest.raises(UserError, match="--batch-size 6 does not divide by 4 data parallel ranks .*; 8 does"):
        BatchLoader(Windows(tokens, 10), batch_size=6, seed=0, dp_size=4)
    state = BatchLoader(Windows(tokens, 10), batch_size=2, seed=0).state_dict()
    for seed, seq_len in ((1, 10), (0, 20)):
        other = BatchLoader(Windows(tokens, seq_len), batch_size=2, seed=seed)
        with pytest.raises(UserError, match="cannot go on with the same data"):
            other.load_state_dict(state)
