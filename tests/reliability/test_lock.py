"""A run folder belongs to one launch at a time."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys

import pytest

from moesaic.train.errors import UserError
from moesaic.train.folder import new_folder
from moesaic.train.lock import RunLock
from moesaic.train.run import set_up
from moesaic.train.runtime import started


def test_the_second_is_told_who_has_the_folder(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}, since 2"):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()


def test_what_a_killed_process_left_behind_locks_nothing(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from moesaic.train.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('has it', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid}"):
        RunLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    RunLock(tmp_path).release()


def test_a_new_run_and_a_resume_are_refused_beside_another(tiny, cache):
    with started("cpu") as runtime:
        run = set_up(tiny, runtime, lambda text: None)
        for resume in (False, True):
            (tiny.out / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
            (tiny.out / "checkpoints" / "step-00000001" / "manifest.json").touch()
            with pytest.raises(UserError, match="in use by" if resume else "is not empty"):
                set_up(dataclasses.replace(tiny, resume=resume), runtime, lambda text: None)
        run.close()


def test_a_start_that_failed_does_not_block_the_folder(tmp_path):
    RunLock(tmp_path).release()
    assert new_folder(tmp_path) == tmp_path


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    assert [new_folder(None).name for _ in range(3)] == [f"20260101-120000{end}" for end in ("", "-2", "-3")]
