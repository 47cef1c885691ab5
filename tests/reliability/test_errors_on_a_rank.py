"""After an exception on any rank the run saves its last step, says so in one line, and a resume goes on exactly."""

import dataclasses
import os

import pytest
import torch

from moesaic.checkpoint import checkpoints
from moesaic.train import loop, step
from moesaic.train.errors import TrainingError
from moesaic.train.metrics import read_jsonl
from tests.train.test_resume import MESH, _assert_equal, _fit, _tensors


def _break(where, at):
    """Let this process fail: within step `at`, or after it."""

    def fail(*args, **kwargs):
        raise MemoryError("no room for\nanything")

    if where == "after the forward pass":
        original = step.sum_of_losses
        calls = iter(range(at - 1))
        step.sum_of_losses = lambda *args: original(*args) if next(calls, None) is not None else fail()
    elif where == "while weights change":
        original = torch.optim.AdamW.step
        calls = iter(range(at - 1))
        torch.optim.AdamW.step = lambda *args: original(*args) if next(calls, None) is not None else fail()
    else:
        original = loop.reset_expert_load
        calls = iter(range(at - 1))
        loop.reset_expert_load = lambda *args: original(*args) if next(calls, None) is not None else fail()


def _fit_and_fail(config, cache, where, victim):
    if int(os.environ.get("RANK", "0")) == victim:
        _break(where, at=4)
    with pytest.raises(TrainingError) as failure:
        _fit(config, cache)
    return str(failure.value), failure.value.told


@pytest.mark.parametrize(
    ("world_size", "layout", "victim", "where", "saved"),
    [
        (2, {"ep": 2}, 1, "after the forward pass", 3),
        (2, {"dp_shard": 2}, 1, "after the step", 4),
        # The other rank is a step ahead. Without another rank only the mark of an update says so.
        (2, {"ep": 2}, 1, "while weights change", None),
        (1, {}, 0, "while weights change", None),
        pytest.param(4, MESH, 2, "after the forward pass", 3, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_last_step_is_saved(tiny, cache, tmp_path, ranks, world_size, layout, victim, where, saved):
    config = dataclasses.replace(tiny, **layout)
    told = ranks(_fit_and_fail, world_size, config, cache, where, victim)
    assert [speaks for _, speaks in told] == [rank == 0 for rank in range(world_size)]
    text = told[0][0]
    assert "\n" not in text
    who = f"rank {victim}" if world_size > 1 else "the program"
    assert f"{who} failed after step {saved or 3}: MemoryError: no room for." in text
    log = config.out / "failures" / f"rank-{victim}.log"
    assert "MemoryError: no room for\nanything" in log.read_text()
    found = [path.name for path in checkpoints(config.out / "checkpoints")]
    if saved is None:
        assert "in the middle of an update, so they are not saved." in text
        launcher = "torchrun" if world_size > 1 else "python"
        assert f"There is no checkpoint yet. To start again: {launcher}" in text
        assert found == []
        return
    assert f"Step {saved} is saved." in text
    assert f"-m moesaic train --resume --out {config.out}" in text
    assert found == [f"step-{saved:08}"]
    if "forward" not in where:
        return

    whole = dataclasses.replace(config, out=tmp_path / "whole")
    ranks(_fit, world_size, whole, cache)
    ranks(_fit, world_size, dataclasses.replace(config, resume=True), cache)
    _assert_equal(_tensors(config, cache)[1], _tensors(whole, cache)[1])
    assert len(read_jsonl(config.out / "metrics.jsonl")) == 6
