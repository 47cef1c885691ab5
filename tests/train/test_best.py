"""Early stopping, the best checkpoint, further sets and the dtype of the export: also through a stop and a resume."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from moesaic.checkpoint import checkpoints, read_manifest
from moesaic.cli import main
from moesaic.train import loop
from moesaic.train.best import Best
from moesaic.train.config import TrainConfig, check, from_json, to_json
from moesaic.train.console import describe
from moesaic.train.errors import UserError
from moesaic.train.metrics import read_jsonl
from moesaic.train.run import set_up
from moesaic.train.runtime import started
from moesaic.train.sets import read_eval_sets
from moesaic.train.training import take_best
from tests.train.chats import tiny_tokenizer, write_chats
from tests.train.test_resume import MESH, _on, _rows, _Screen, _train

SCORES = {1: 5.0, 2: 4.0, 3: 4.5, 4: 4.0, 5: 3.0, 6: 3.5}


def _scripted(config, signals=()):
    """Train in this process where measurements come to `SCORES`: whether it finished, its steps and its checkpoints."""
    with started("cpu") as runtime:
        screen = _Screen(signals)
        run = set_up(config, runtime, screen.message)
        finished = loop.fit(run, screen, lambda: {"bits_per_byte": SCORES[run.training.step]})
        run.close()
    saved = checkpoints(config.out / "checkpoints")
    return finished, run.training.step, {int(path.name[-8:]): read_manifest(path).info["best"] for path in saved}


@pytest.fixture
def measured(tiny):
    return dataclasses.replace(tiny, eval_every=1, save_every=1, keep=1)


def test_best_and_misses():
    best = Best()
    assert [best.note(SCORES[step], step) for step in SCORES] == [True, True, False, False, True, False]
    assert best == Best(3.0, 5, 1)


def test_a_run_ends_early_and_stays_ended(measured):
    config = dataclasses.replace(measured, early_stop=2)
    best = {"score": 4.0, "step": 2, "misses": 2}
    assert _scripted(config) == (True, 4, {4: best})
    # A resume does not begin again. With more patience it goes on, and knows what was best.
    again = dataclasses.replace(config, resume=True)
    assert _scripted(again) == (True, 4, {4: best})
    assert _scripted(dataclasses.replace(again, early_stop=3)) == (True, 6, {6: {"score": 3.0, "step": 5, "misses": 1}})


def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(measured, tmp_path):
    whole = dataclasses.replace(measured, early_stop=2, keep_best=True, out=tmp_path / "whole")
    part = dataclasses.replace(whole, out=tmp_path / "part")
    expected = _scripted(whole)
    assert _scripted(part, {2: [signal.SIGTERM]})[:2] == (False, 3)
    assert _scripted(dataclasses.replace(part, resume=True)) == expected
    assert _rows(part.out) == _rows(whole.out)


@pytest.mark.long
def test_the_best_checkpoint_is_kept_beside_the_newest(measured):
    config = dataclasses.replace(measured, keep_best=True, early_stop=2)
    finished, step, saved = _scripted(config)
    assert (finished, step, sorted(saved)) == (True, 4, [2, 4])
    # Without regular checkpoints one is written for each best measurement, and for the last step.
    config = dataclasses.replace(config, out=config.out.with_name("other"), save_every=0, early_stop=0)
    assert sorted(_scripted(config)[2]) == [5, 6]


@pytest.mark.long
def test_the_best_weights_are_taken(measured):
    config = dataclasses.replace(measured, keep_best=True, early_stop=2)
    _scripted(config)
    with started("cpu") as runtime:
        run = set_up(dataclasses.replace(config, resume=True), runtime, lambda text: None)
        last = {name: tensor.clone() for name, tensor in run.training.model.state_dict().items()}
        take_best(run.training, run.folder)
        best = {name: tensor.clone() for name, tensor in run.training.model.state_dict().items()}
        run.close()
    # A run that is resumed from that checkpoint has them.
    shutil.rmtree(config.out / "checkpoints" / "step-00000004")
    with started("cpu") as runtime:
        run = set_up(dataclasses.replace(config, resume=True), runtime, lambda text: None)
        run.close()
    assert run.training.step == 2
    assert [name for name, t in run.training.model.state_dict().items() if not torch.equal(t, best[name])] == []
    assert not torch.equal(last["lm_head.weight"], best["lm_head.weight"])


def test_the_whole_program(measured, cache, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("the red cat sees a dog.\n" * 40)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more.txt").write_text("a tree.\n" * 40)
    sets = (str(tmp_path / "more.txt"), str(tmp_path / "other" / "more.txt"))
    config = dataclasses.replace(
        measured, keep_best=True, early_stop=1, eval_data=sets, export_dtype="bf16", lr=0.3, eval_every=2, save_every=0
    )
    _train(config, cache)
    out = capsys.readouterr().out
    rows = [row for row in read_jsonl(config.out / "metrics.jsonl") if "bits_per_byte" in row]
    assert [row["step"] for row in rows] == list(range(2, 2 * len(rows) + 1, 2))
    first = [row["bits_per_byte/more"] for row in rows]
    best = rows[first.index(min(first))]
    result = json.loads((config.out / "result.json").read_text())
    assert result["best_step"] == best["step"]
    # What is exported is rounded to bf16, as the weights that are measured before it are not.
    assert result["bits_per_byte/more"] == pytest.approx(best["bits_per_byte/more"], rel=1e-6)
    assert result["bits_per_byte/more-2"] == pytest.approx(best["bits_per_byte/more-2"], rel=1e-6)
    assert f"more-2 {best['bits_per_byte/more-2']:.3f} bits/byte" in out
    # The export is that checkpoint, as `moesaic convert` writes it.
    place = config.out / "checkpoints" / f"step-{best['step']:08}"
    assert main(["convert", str(place), str(tmp_path / "converted"), "--dtype", "bfloat16"]) == 0
    exported, converted = (load_file(p / "model.safetensors") for p in (config.out / "export", tmp_path / "converted"))
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert exported.keys() == converted.keys()
    assert [name for name in exported if not torch.equal(exported[name], converted[name])] == []
    assert json.loads((config.out / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    # And `moesaic eval` measures the same set to the same score, in rows of the run.
    capsys.readouterr()
    assert main(["eval", str(place), "--data", sets[0], "--json", "--max-bytes", "2000", "--device", "cpu"]) == 0
    measured_there = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert measured_there == pytest.approx(result["bits_per_byte/more"], rel=1e-6)


@pytest.mark.long
def test_best_weights_that_are_gone_are_told(measured, cache, capsys):
    config = dataclasses.replace(measured, keep_best=True, eval_every=2, steps=4, lr=0.5)
    _train(config, cache)
    capsys.readouterr()
    manifest = checkpoints(config.out / "checkpoints")[-1]
    step = read_manifest(manifest).info["best"]["step"]
    if step == 4:
        pytest.skip("the last step was the best")
    shutil.rmtree(config.out / "checkpoints" / f"step-{step:08}")
    _train(dataclasses.replace(config, resume=True), cache)
    assert f"warning: the best weights, of step {step}, cannot be read" in capsys.readouterr().out


@pytest.mark.long
def test_on_ranks_the_same_step_is_best(tiny, cache, tmp_path, ranks):
    results = []
    for world_size, layout in ((1, {}), (4, MESH)):
        config = dataclasses.replace(
            tiny, out=tmp_path / f"run-{world_size}", eval_every=1, keep_best=True, early_stop=2, lr=0.3, **layout
        )
        _on(ranks, world_size, _train, config, cache)
        result = json.loads((config.out / "result.json").read_text())
        results.append((result["step"], result["best_step"], result["bits_per_byte"]["model"]))
    assert results[0][:2] == results[1][:2]
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-4)


@pytest.mark.parametrize(("name", "value"), [("early_stop", 1), ("keep_best", True)])
def test_what_needs_measurements_says_so(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} needs measurements: give --eval-every"):
        check(TrainConfig(**{name: value}))


def test_further_sets_in_settings_and_on_the_screen():
    config = TrainConfig(eval_data=("a", "b"), early_stop=2, eval_every=1)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert describe({"held_out_loss": 1.0, "bits_per_byte/old texts": 2.0, "held_out_loss/new": 3.0}) == (
        "held-out loss 1.0000  old texts 2.000 bits/byte  new loss 3.0000"
    )


def test_a_set_that_is_not_there_leaves_no_folder(tiny, cache):
    config = dataclasses.replace(tiny, eval_data=("/no/such/place",))
    with pytest.raises(UserError, match="--eval-data /no/such/place: there is no such file or folder"):
        _train(config, cache)
    assert not config.out.exists()


def test_what_is_said_of_a_set_names_it(tmp_path):
    chats = str(write_chats(tmp_path / "chats.jsonl"))
    said = []
    config = TrainConfig(eval_data=(chats,), seq_len=16)
    read_eval_sets(config, tokenizer := tiny_tokenizer(), said.append)
    assert [text for text in said if text.startswith(f"--eval-data {chats}: ") and "are longer than" in text]
    with pytest.raises(UserError, match=f"--eval-data {chats}: --seq-len 2: no conversation has anything to learn"):
        read_eval_sets(dataclasses.replace(config, seq_len=2), tokenizer, said.append)
