"""Saving in the background: the copy is of one moment, and failures come out at the next call."""

import os
import threading

import pytest
import torch

from moesaic import checkpoint, ranks
from moesaic.checkpoint import CheckpointError
from tests.checkpoint.test_store import _sharded, _state, _values


def _save_while_weights_change(root):
    state = _sharded(1) if ranks.active() else _state(1)
    gate = threading.Event()
    original = os.fsync

    def slow(descriptor):
        gate.wait(30)
        original(descriptor)

    os.fsync = slow
    try:
        checkpoint.save(root, 1, state, {"a": 1}, blocking=False)
        # It is not written yet, and the loop goes on.
        assert checkpoint.checkpoints(root) == []
        for tensor in (state["model"]["w"], state["optimizer"]["w"]["m"]):
            tensor.add_(1)
            if ranks.active():
                ranks.barrier()
        gate.set()
        checkpoint.wait()
    finally:
        os.fsync = original
    if ranks.is_leader():
        assert [path.name for path in checkpoint.checkpoints(root)] == ["step-00000001"]
    # Again, and a blocking save after it waits.
    checkpoint.save(root, 2, state, {}, blocking=False)
    checkpoint.save(root, 3, _sharded(9) if ranks.active() else _state(9), {}, keep=3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_written_is_the_state_of_the_call(tmp_path, ranks, world_size):
    ranks(_save_while_weights_change, world_size, tmp_path)
    for path, value in zip(checkpoint.checkpoints(tmp_path), (1.0, 2.0, 9.0), strict=True):
        state = _state(0)
        checkpoint.store.read_into(path, state)
        checkpoint.store.verify(path)
        assert _values(state) == {value}


def _fail_in_the_background(root):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    checkpoint.save(root, 1, _sharded(1), {})
    original = os.fsync
    if ranks.rank() == 1:
        os.fsync = full
    checkpoint.save(root, 2, _sharded(2), {}, blocking=False)
    with pytest.raises(CheckpointError, match="in the background failed: cannot write .*No space left on device"):
        checkpoint.save(root, 3, _sharded(3), {}, blocking=False)
    os.fsync = original
    checkpoint.save(root, 4, _sharded(4), {}, blocking=False)
    checkpoint.wait()


def test_a_failure_is_raised_at_the_next_save_on_all_ranks(tmp_path, ranks):
    ranks(_fail_in_the_background, 2, tmp_path)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001", "step-00000004"]


def test_a_state_that_is_not_in_memory_is_refused(tmp_path):
    planner = torch.distributed.checkpoint.DefaultSavePlanner()
    with pytest.raises(ValueError, match="planner: .* use blocking=True"):
        checkpoint.save(tmp_path, 1, _state(1), {}, planner=planner, blocking=False)
    with pytest.raises(TypeError, match="info: only JSON"):
        checkpoint.save(tmp_path, 1, _state(1), {"a": object()}, blocking=False)
    assert not list(tmp_path.iterdir())
