"""kill -9 at file events of checkpoints, exports and caches: nothing is lost, and nothing is mixed."""

import os

import pytest
import torch
from safetensors.torch import load_file

from moesaic import checkpoint
from moesaic.integrations.transformers import export_pretrained, swap_moe
from moesaic.integrations.transformers.saving import recover_export
from moesaic.testing.pool import RankError
from moesaic.train.prepare import prepare
from tests.checkpoint.test_store import _sharded, _state, _values
from tests.integrations.families import make_model
from tests.reliability.file_events import FileEvents

_RENAMES = ("rename", "exchange")


def _save(root, same_step, victim, at, exchange, only):
    """Save a step, then the next one or the same again, and die at an event of the latter; else count them."""
    checkpoint.save(root, 1, _sharded(1), {}, keep=1)
    with FileEvents(at if checkpoint.store.ranks.rank() == victim else None, exchange=exchange, only=only) as events:
        checkpoint.save(root, 1 if same_step else 2, _sharded(2), {}, keep=1)
    return events.count


def _save_in_the_background(root, same_step, victim, at, exchange, only):
    checkpoint.save(root, 1, _sharded(1), {}, keep=1)
    with FileEvents(at if checkpoint.store.ranks.rank() == victim else None, exchange=exchange, only=only) as events:
        checkpoint.save(root, 1 if same_step else 2, _sharded(2), {}, keep=1, blocking=False)
        checkpoint.wait()
    return events.count


def _check_checkpoint(root):
    state = _state(0)
    checkpoint.load(root, state)
    assert len(_values(state)) == 1
    assert _values(state) <= {1.0, 2.0}
    # The next save works, and tidies up.
    checkpoint.save(root, 3, _state(3), {}, keep=1)
    assert [path.name for path in root.iterdir()] == ["step-00000003"]


def _model(value):
    model = make_model("Mixtral")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return swap_moe(model)


def _export(root, same_step, victim, at, exchange, only):
    export_pretrained(_model(1.0), root / "export")
    with FileEvents(at if checkpoint.store.ranks.rank() == victim else None, exchange=exchange, only=only) as events:
        export_pretrained(_model(2.0), root / "export")
    return events.count


def _check_export(root):
    recover_export(root / "export")
    tensors = load_file(root / "export" / "model.safetensors")
    values = {float(x) for tensor in tensors.values() for x in tensor.flatten()}
    assert values in ({1.0}, {2.0})
    assert (root / "export" / "config.json").is_file()


def _kill_at_each(ranks, root, work, check, world_size, *, same_step=True, exchange=True, only=None):
    """The number of kills: one at each event of each rank."""
    counts = ranks(work, world_size, root / "counted", same_step, 0, None, exchange, only)
    for victim, count in enumerate(counts):
        for at in range(1, count + 1):
            place = root / f"{victim}-{at}"
            with pytest.raises(RankError, match="exit code -9"):
                ranks(work, world_size, place, same_step, victim, at, exchange, only)
            check(place)
    return sum(counts)


def test_a_checkpoint_that_is_written_again(tmp_path, ranks):
    assert _kill_at_each(ranks, tmp_path, _save, _check_checkpoint, 1, exchange=False, only=_RENAMES) >= 3


def test_an_export_over_an_export(tmp_path, ranks):
    assert _kill_at_each(ranks, tmp_path, _export, _check_export, 1, exchange=False, only=_RENAMES) >= 3


@pytest.mark.long
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("same_step", [True, False], ids=["same step", "next step"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_event_of_a_checkpoint(tmp_path, ranks, world_size, same_step, exchange):
    if not same_step and not exchange:
        pytest.skip("nothing is exchanged")
    kills = _kill_at_each(ranks, tmp_path, _save, _check_checkpoint, world_size, same_step=same_step, exchange=exchange)
    print(f"{kills} kills")
    assert kills > 15


@pytest.mark.long
def test_every_event_of_a_save_in_the_background(tmp_path, ranks):
    kills = _kill_at_each(ranks, tmp_path, _save_in_the_background, _check_checkpoint, 2, same_step=False)
    print(f"{kills} kills")
    assert kills > 20


@pytest.mark.long
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_every_event_of_an_export(tmp_path, ranks, exchange):
    kills = _kill_at_each(ranks, tmp_path, _export, _check_export, 1, exchange=exchange)
    print(f"{kills} kills")
    assert kills > 10


def _prepare(root, same_step, victim, at, exchange, only):
    os.environ["XDG_CACHE_HOME"] = str(root)
    with FileEvents(at, exchange=exchange, only=only) as events:
        text = prepare(str(root.parent / "text"), text_column=None, tokenizer=None, vocab_size=300)
    return events.count, text.tokens().tolist()


@pytest.mark.long
def test_every_event_of_a_cache(tmp_path, ranks):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"{index} some words of a text\n" * 20)
    [(count, whole)] = ranks(_prepare, 1, tmp_path / "counted", True, 0, None, True, None)
    print(f"{count} kills")
    assert count > 10
    for at in range(1, count + 1):
        place = tmp_path / str(at)
        with pytest.raises(RankError, match="exit code -9"):
            ranks(_prepare, 1, place, True, 0, at, True, None)
        [(_, tokens)] = ranks(_prepare, 1, place, True, 0, None, True, None)
        assert tokens == whole
