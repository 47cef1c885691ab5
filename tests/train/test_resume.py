"""An interrupted run that is resumed is the run that was not interrupted: bit for bit on the same layout."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moesaic import checkpoint
from moesaic.checkpoint import checkpoints, read_manifest
from moesaic.checkpoint.store import verify
from moesaic.train import loop
from moesaic.train.errors import TrainingError, UserError
from moesaic.train.metrics import read_jsonl
from moesaic.train.run import set_up
from moesaic.train.runtime import started
from moesaic.train.signals import StopRequest
from moesaic.train.training import save
from tests.train.conftest import MODEL, write_corpus

MESH = {"tp": 2, "ep": 2, "etp": 2}
# Rows go over two nodes first.
NODES = {"tp": 2, "ep": 4, "ranks_per_node": 2, "compute": "local"}
# A balance loss of each sequence is the same however a batch is cut.
STAGES = {"pp": 2, "microbatches": 2, "aux_loss": "sequence"}


class _Screen:
    """Collects messages; sends this process signals when a step is done."""

    def __init__(self, signals=()):
        self.messages = []
        self.signals = dict(signals)

    def message(self, text):
        self.messages.append(text)

    def start(self, step, steps):
        pass

    def update(self, step, values):
        for number in self.signals.get(step, ()):
            os.kill(os.getpid(), number)

    def stop(self):
        pass


def _fit(config, cache, signals=(), victim=0):
    """Train, with signals to rank `victim`; say whether it finished, and what the screen showed."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with started("cpu") as runtime:
        screen = _Screen(signals if runtime.rank == victim else ())
        run = set_up(config, runtime, screen.message)
        screen.message(loop._introduce(run))
        finished = loop.fit(run, screen)
        run.close()
        if dist.is_initialized():
            dist.barrier()
        return finished, screen.messages


def _train(config, cache):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    loop.train(config)


def _rows(folder):
    """All metrics but those that a clock or the machine decides."""
    skip = {"tokens_per_second", "tflops", "memory_gib", "time"}
    return [
        {key: value for key, value in row.items() if key not in skip} for row in read_jsonl(folder / "metrics.jsonl")
    ]


def _tensors(config, cache):
    """The whole state of a run as its last checkpoint has it, on one process."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    layout = dict.fromkeys(("pp", "tp", "cp", "ep", "etp", "dp_replicate"), 1)
    layout |= dict.fromkeys(("dp_shard", "microbatches", "ranks_per_node"))
    config = dataclasses.replace(config, resume=True, **layout)
    with started("cpu") as runtime:
        run = set_up(config, runtime, lambda text: None)
        run.close()
        names = {parameter: name for name, parameter in run.training.model.named_parameters()}
        tensors = {name: parameter.detach() for parameter, name in names.items()}
        for parameter, state in run.training.optimizer.state.items():
            tensors |= {f"{names[parameter]}.{key}": value for key, value in state.items()}
        return run.training.step, tensors


def _assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def _on(ranks, world_size, fn, *args, **kwargs):
    return [fn(*args, **kwargs)] if world_size == 1 else ranks(fn, world_size, *args, **kwargs)


@pytest.mark.parametrize(
    ("world_size", "changes", "victim"),
    [
        (1, {}, 0),
        (1, {"dtype": "bf16", "accumulate": 2, "recompute": "full"}, 0),
        (1, {"optimizer": "muon"}, 0),
        pytest.param(2, {"cp": 2, "ep": 2, "accumulate": 2, "recompute": "selective"}, 1, marks=pytest.mark.slow),
        pytest.param(4, MESH | {"optimizer": "muon"}, 2, marks=pytest.mark.long),
        pytest.param(2, STAGES, 1, marks=pytest.mark.slow),
        (4, MESH, 2),
        pytest.param(4, NODES, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_signal_saves_and_a_resume_is_exact(tiny, cache, tmp_path, ranks, world_size, changes, victim):
    whole = dataclasses.replace(tiny, out=tmp_path / "whole", **changes)
    part = dataclasses.replace(tiny, out=tmp_path / "part", **changes)
    assert all(finished for finished, _ in _on(ranks, world_size, _fit, whole, cache))

    # The second signal must not harm the save that the first one asked for.
    results = _on(ranks, world_size, _fit, part, cache, {2: [signal.SIGTERM, signal.SIGINT]}, victim=victim)
    assert [finished for finished, _ in results] == [False] * world_size
    assert [path.name for path in checkpoints(part.out / "checkpoints")] == ["step-00000003"]
    messages = "\n".join(results[victim][1])
    assert messages.count("saving after this step") == 1
    assert "stopped after step 3 of 6" in messages
    assert f"--resume --out {part.out}" in messages
    assert ("in two hops, over 2 nodes and then over 2 ranks of each: about" in messages) == (changes == NODES)

    resumed = dataclasses.replace(part, resume=True)
    assert all(finished for finished, _ in _on(ranks, world_size, _fit, resumed, cache))
    assert _rows(part.out) == _rows(whole.out)
    assert len(_rows(whole.out)) == 6
    step, tensors = _tensors(part, cache)
    assert step == 6
    _assert_equal(tensors, _tensors(whole, cache)[1])


LAYOUTS = {
    "one": (1, {}),
    "cp": (2, {"cp": 2, "etp": 2}),
    "mesh": (4, MESH),
    "pp": (2, {"pp": 2, "microbatches": 2}),
    "pp x ep": (4, {"pp": 2, "microbatches": 2, "ep": 2}),
}
_SLOWER = [
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [("mesh", "one"), ("pp", "one"), ("one", "pp")]),
    *(pytest.param(*pair, marks=pytest.mark.long) for pair in [("one", "cp"), ("cp", "mesh"), ("pp x ep", "mesh")]),
]


@pytest.mark.parametrize(
    ("before", "after"),
    [("one", "mesh"), *_SLOWER],
)
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.long)])
def test_resume_on_another_layout(tiny, cache, tmp_path, ranks, before, after, tied):
    (size_before, layout_before), (size_after, layout_after) = LAYOUTS[before], LAYOUTS[after]
    tiny = dataclasses.replace(tiny, aux_loss="sequence")
    if tied:
        file = tmp_path / "tied.json"
        file.write_text(json.dumps({**MODEL, "tie_word_embeddings": True}))
        tiny = dataclasses.replace(tiny, model=str(file))
    whole = dataclasses.replace(tiny, out=tmp_path / "whole", **layout_before)
    _on(ranks, size_before, _fit, whole, cache)
    part = dataclasses.replace(tiny, out=tmp_path / "part", **layout_before)
    _on(ranks, size_before, _fit, part, cache, {2: [signal.SIGTERM]})
    step, saved = _tensors(part, cache)
    assert step == 3

    # Resumed, saved again without a step, and the very same tensors.
    elsewhere = dataclasses.replace(tiny, out=part.out, resume=True, **layout_after)
    [again, *_] = _on(ranks, size_after, _resume_and_save, elsewhere, cache)
    assert again == 3
    _assert_equal(saved, _tensors(part, cache)[1])

    _on(ranks, size_after, _fit, elsewhere, cache)
    for one, other in zip(_rows(part.out), _rows(whole.out), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert read_manifest(checkpoints(part.out / "checkpoints")[-1]).world_size == size_after


def _resume_and_save(config, cache):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with started("cpu") as runtime:
        run = set_up(config, runtime, lambda text: None)
        save(run.training, run.config, run.folder)
        run.close()
        return run.training.step


def test_the_whole_program_and_its_second_call(tiny, cache, capsys):
    config = dataclasses.replace(tiny, save_every=2, keep=2, tensorboard=True, eval_every=3)
    _train(config, cache)
    out = capsys.readouterr().out
    assert re.search(r"unigram bytes \d\.\d+   bigram bytes \d\.\d+   this model \d", out)
    assert "the model continues 'def main(' like this:\n\ndef main(" in out
    assert sorted(path.name for path in config.out.iterdir()) == [
        "checkpoints",
        "config.json",
        "export",
        "lock",
        "metrics.jsonl",
        "result.json",
        "tensorboard",
        "tokenizer",
    ]
    assert [path.name for path in checkpoints(config.out / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert [row["step"] for row in read_jsonl(config.out / "metrics.jsonl") if "bits_per_byte" in row] == [3, 6]
    with pytest.raises(UserError, match="is not empty"):
        _train(config, cache)
    # A finished run, resumed, only does its end again.
    exported = load_file(config.out / "export" / "model.safetensors")
    _train(dataclasses.replace(config, resume=True), cache)
    assert "step 6/6" not in capsys.readouterr().out
    _assert_equal(exported, load_file(config.out / "export" / "model.safetensors"))


@pytest.mark.slow
def test_the_whole_program_on_ranks_of_cp(tiny, cache, ranks):
    config = dataclasses.replace(tiny, cp=2, etp=2, eval_every=3, save_every=4)
    one = dataclasses.replace(tiny, out=tiny.out.with_name("one"), eval_every=3)
    ranks(_train, 2, config, cache)
    _train(one, cache)
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in (config.out, one.out))
    assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert result["export_difference"] < 1e-5
    losses, expected = ([row.get("loss") for row in _rows(folder)] for folder in (config.out, one.out))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_runs_go_into_new_folders_of_their_own(tiny, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(tiny, out=None, steps=1)
    for count in (1, 2):
        _fit(config, cache)
        assert len(list(Path("runs").iterdir())) == count
    _fit(dataclasses.replace(config, resume=True, steps=2), cache)
    assert sorted(len(read_jsonl(path / "metrics.jsonl")) for path in Path("runs").iterdir()) == [1, 2]


def test_other_text_or_another_model_is_refused(tiny, cache, tmp_path):
    _fit(dataclasses.replace(tiny, steps=1), cache)
    other_text = str(write_corpus(tmp_path / "other", documents=61))
    with pytest.raises(UserError, match=r"--data, --tokenizer had other contents before\."):
        _fit(dataclasses.replace(tiny, resume=True, data=other_text), cache)
    other_model = tmp_path / "config.json"
    other_model.write_text(Path(tiny.model).read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(UserError, match=r"--model had other contents before\."):
        _fit(dataclasses.replace(tiny, resume=True, model=str(other_model)), cache)
    with pytest.raises(UserError, match=r"with --optimizer muon: its checkpoint has the state of adamw\. Leave"):
        _fit(dataclasses.replace(tiny, resume=True, optimizer="muon"), cache)
    with pytest.raises(UserError, match="seed was 0 and now is 1"):
        _fit(dataclasses.replace(tiny, resume=True, seed=1), cache)
    assert len(_rows(tiny.out)) == 1


def test_a_failed_run_says_where_to_go_on(tiny, cache):
    _fit(dataclasses.replace(tiny, steps=2), cache)
    hopeless = dataclasses.replace(tiny, resume=True, lr=1e30, max_grad_norm=0.0)
    told = r"step \d: .*step-00000002\. To continue from it, perhaps with a lower --lr: python .* --resume --out "
    with pytest.raises(TrainingError, match=told):
        _fit(hopeless, cache)


def test_a_full_disk_in_the_middle_does_not_end_the_run(tiny, cache, monkeypatch):
    original, left = os.fsync, iter(range(1))

    def full(descriptor):
        if next(left, None) is not None:
            raise OSError(28, os.strerror(28))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    finished, messages = _fit(dataclasses.replace(tiny, save_every=2), cache)
    assert finished
    assert "No space left on device" in "\n".join(messages)
    assert [path.name for path in checkpoints(tiny.out / "checkpoints")] == ["step-00000004", "step-00000006"]


def test_checkpoints_in_the_background_are_those_of_the_foreground(tiny, cache, tmp_path, monkeypatch):
    whole = dataclasses.replace(tiny, save_every=2, keep=9)
    _fit(whole, cache)
    beside = dataclasses.replace(whole, out=tmp_path / "beside", async_checkpoints=True)
    blocking = []
    original = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: blocking.append(k["blocking"]) or original(*a, **k))
    _fit(beside, cache)
    assert blocking == [False] * 3
    for one, other in zip(*(checkpoints(run.out / "checkpoints") for run in (whole, beside)), strict=True):
        files = [read_manifest(path).files["__0_0.distcp"] for path in (one, other)]
        assert files[0] == files[1]
        verify(other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_waits_for_a_save_in_the_background(tiny, cache, number):
    config = dataclasses.replace(tiny, save_every=1, keep=9, async_checkpoints=True)
    assert not _fit(config, cache, {2: [number]})[0]
    found = checkpoints(tiny.out / "checkpoints")
    assert [verify(path).step for path in found] == [1, 2, 3]
    assert len(list((tiny.out / "checkpoints").iterdir())) == 3


def test_a_damaged_manifest_is_skipped(tiny, cache, caplog):
    _fit(dataclasses.replace(tiny, save_every=2, keep=9), cache)
    newest = checkpoints(tiny.out / "checkpoints")[-1]
    (newest / "manifest.json").write_bytes(b"{")
    finished, _ = _fit(dataclasses.replace(tiny, resume=True), cache)
    assert finished
    assert f"{newest.name}/manifest.json is damaged" in caplog.text
    assert [row["step"] for row in read_jsonl(tiny.out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_closed_terminal_saves_but_not_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, wanted in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with StopRequest(lambda name: None) as request:
                os.kill(os.getpid(), signal.SIGHUP)
                assert request.wanted == wanted
    finally:
        signal.signal(signal.SIGHUP, before)
