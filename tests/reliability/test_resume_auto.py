"""`--resume auto` goes on where there is something and starts where there is nothing; torchrun's restarts take it."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from moesaic.checkpoint import checkpoints
from moesaic.train import loop
from moesaic.train.command import parse
from moesaic.train.errors import UserError
from moesaic.train.folder import launch_id
from moesaic.train.lock import RunLock
from moesaic.train.metrics import read_jsonl
from tests.train.conftest import MODEL
from tests.train.test_program import _command
from tests.train.test_resume import _assert_equal, _fit, _tensors


@pytest.mark.parametrize("call", [["--resume", "auto"], ["--resume=auto"]], ids=str)
def test_it_starts_and_then_goes_on(tiny, cache, call):
    more = ["--out", str(tiny.out), "--lr", "0.02"]
    assert parse([*call, *more], leader=True).resume == "auto"
    _fit(dataclasses.replace(tiny, steps=2, resume="auto"), cache)
    again = parse([*call, *more], leader=True)
    assert (again.resume, again.lr, again.seq_len) == (True, 0.02, tiny.seq_len)
    assert parse(["--resume", *more], leader=True).resume is True


def test_a_run_that_saved_nothing_starts_again_in_its_folder(tiny, cache, monkeypatch):
    monkeypatch.setattr(loop, "save", lambda *args: None)
    _fit(dataclasses.replace(tiny, steps=3), cache)
    monkeypatch.undo()
    assert checkpoints(tiny.out / "checkpoints") == []
    with pytest.raises(UserError, match="is not empty.*starts again there with --resume auto"):
        _fit(tiny, cache)
    with pytest.raises(UserError, match="has no checkpoint yet; --resume auto starts it again there"):
        _fit(dataclasses.replace(tiny, resume=True), cache)
    # The settings are those of the run, as the command that a failed run prints needs them.
    assert parse(["--resume", "auto", "--out", str(tiny.out)], leader=True).batch_size == tiny.batch_size
    _fit(dataclasses.replace(tiny, resume="auto"), cache)
    assert [row["step"] for row in read_jsonl(tiny.out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="has files, but no run; choose another folder"):
        parse(["--resume", "auto", "--out", str(tmp_path)], leader=True)


def test_a_restart_finds_the_folder_of_its_launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some-job")
    mine, other = (tmp_path / "runs" / name for name in ("20260101-000000", "20260101-000001"))
    for folder in (mine, other):
        folder.mkdir(parents=True)
        RunLock(folder).release()
    lock = json.loads((other / "lock").read_text())
    (other / "lock").write_text(json.dumps(lock | {"launch": ["some-job", *launch_id()[1:-1], "1"]}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert parse([], leader=True).out is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = parse([], leader=True)
    assert (config.out, config.resume) == (mine.relative_to(tmp_path), "auto")


def test_another_directory_is_no_obstacle(tiny, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny.data, "text")
    os.symlink(tiny.model, "shape.json")
    _fit(dataclasses.replace(tiny, data="text", model="shape.json", steps=2), cache)
    monkeypatch.chdir("/")
    config = parse(["--resume", "--out", str(tiny.out), "--steps", "3"], leader=True)
    assert _fit(config, cache)[0]
    with pytest.raises(UserError, match="--steps 2: the run in .* has done 3 steps already; give more"):
        _fit(dataclasses.replace(config, steps=2), cache)


def test_a_model_that_cannot_compute_leaves_no_folder(tiny, cache, tmp_path):
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(MODEL | {"num_attention_heads": 4, "num_key_value_heads": 3}))
    with pytest.raises(UserError, match="a model of this config cannot compute: "):
        _fit(dataclasses.replace(tiny, model=str(shape)), cache)
    assert not tiny.out.exists()


# Where a rank is killed on the first tries, one place a try: before the run folder, before the first checkpoint, within
# a step, within a checkpoint, within the export.
_DEADLY = """
import os, signal, sys
from pathlib import Path
sys.argv[0] = "moesaic"
import moesaic.cli
from moesaic.checkpoint import store
from moesaic.train import finish, loop, run, step

attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
places = [
    (run, "_claim_folder", 1),
    (step, "sum_of_losses", 2),
    (step, "sum_of_losses", 3),
    (store, "_describe_own", 2),
    (finish, "export_pretrained", 1),
]
places = [places[int(i)] for i in os.environ["PLACES"].split(",")]

def deadly(module, name, calls):
    original = getattr(module, name)
    left = iter(range(calls - 1))
    def call(*args, **kwargs):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, call)

if os.environ["RANK"] == os.environ["VICTIM"] and attempt < len(places):
    deadly(*places[attempt])
raise SystemExit(moesaic.cli.main())
"""


def _under_torchrun(config, tmp_path, places):
    program = tmp_path / "deadly.py"
    program.write_text(_DEADLY)
    command = _command(config, "--steps", "6", "--save-every", "2", "--no-tensorboard")
    at = command.index("-m", 3)
    command[at : at + 2] = [str(program)]
    command.insert(at, "--max-restarts=3")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PLACES": ",".join(map(str, places)), "VICTIM": "1"}
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, timeout=300)


@pytest.mark.parametrize(
    "places", [pytest.param([0, 2, 3], marks=pytest.mark.long), pytest.param([1, 4], marks=pytest.mark.long)], ids=str
)
def test_restarts_end_as_the_uninterrupted_run(tiny, cache, tmp_path, places):
    whole = dataclasses.replace(tiny, out=tmp_path / "whole")
    command = _command(whole, "--steps", "6", "--save-every", "2", "--no-tensorboard")
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    done = _under_torchrun(tiny, tmp_path, places)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("rank 1 was lost") == len(places), done.stdout
    fitted = dataclasses.replace(tiny, steps=6, batch_size=2, seq_len=15, save_every=2)
    _assert_equal(_tensors(fitted, cache)[1], _tensors(dataclasses.replace(fitted, out=whole.out), cache)[1])
    assert [row["step"] for row in read_jsonl(tiny.out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_rank_0_is_lost_and_with_it_the_store(tiny, cache, tmp_path):
    """Without torchrun it is rank 0 that holds the store."""
    program = tmp_path / "deadly.py"
    program.write_text(_DEADLY)
    command = _command(tiny, "--steps", "6", "--no-tensorboard")
    call = [sys.executable, str(program), *command[command.index("train") :]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PLACES": "2", "VICTIM": "0", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(call, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in "01"]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [-9, 1]
    assert "moesaic train: the launcher or a rank was lost after step 2" in said[1]
    assert "Traceback" not in said[1]
