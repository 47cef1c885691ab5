"""The program as it is called: `python -m moesaic train` under torchrun, with real signals from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from moesaic.checkpoint import checkpoints
from moesaic.train.metrics import read_jsonl

# Rank 0 needs longer than the others to see what is wrong.
SLOW_FIRST_RANK = """
import os, sys, time
from moesaic import cli
from moesaic.train import launch

check = launch.check_launch
launch.check_launch = lambda config: (time.sleep(2 if os.environ["RANK"] == "0" else 0), check(config))
sys.exit(cli.main())
"""


def _command(config, *more, program=("-m", "moesaic")):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(*program, "train", "--tp", "2", "--etp", "2"),
        *("--data", config.data, "--model", config.model, "--out", str(config.out)),
        *("--batch-size", "2", "--seq-len", "15", "--log-every", "1", "--eval-bytes", "500", "--sample-tokens", "4"),
        *more,
    ]


def _start(config, *more, **kwargs):
    # Of a session of its own: a signal to its group is what Ctrl-C in a terminal is.
    return subprocess.Popen(
        _command(config, *more, **kwargs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _wait_for_steps(config, process, count):
    metrics = config.out / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no step {count}: {process.communicate()[0]}")


# The short tests send signals to ranks without a launcher, and lose a rank under torchrun.
@pytest.mark.long
def test_ctrl_c_and_going_on_under_torchrun(tiny, cache):
    process = _start(tiny, "--steps", "100000")
    _wait_for_steps(tiny, process, 3)
    # Every rank gets this from the terminal and once more from the launcher, which gets it as well.
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    stopped = re.search(r"stopped after step (\d+) of 100000; everything is saved", out)
    assert stopped, out
    step = int(stopped[1])
    assert [path.name for path in checkpoints(tiny.out / "checkpoints")] == [f"step-{step:08}"]
    # Both ranks ended by themselves, with exit code 0.
    assert "exitcode" not in out

    process = _start(tiny, "--resume", "--steps", str(step + 2))
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert f"continuing after step {step}" in out
    assert [row["step"] for row in read_jsonl(tiny.out / "metrics.jsonl")] == list(range(1, step + 3))
    result = json.loads((tiny.out / "result.json").read_text())
    assert result["step"] == step + 2
    assert result["export_difference"] < 1e-5
    # Settings came from the run's folder, what was given anew is there too.
    settings = json.loads((tiny.out / "config.json").read_text())["settings"]
    assert (settings["steps"], settings["batch_size"], settings["etp"]) == (step + 2, 2, 2)


def test_a_mistake_is_told_once(tiny, cache, tmp_path):
    """torchrun ends all ranks when one has failed; the others leave rank 0 the time to say why."""
    program = tmp_path / "program.py"
    program.write_text(SLOW_FIRST_RANK)
    process = _start(tiny, "--tp", "3", program=(str(program),))
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("moesaic train: ") == 1
    assert "moesaic train: dp_replicate * cp * tp = 1 * 1 * 3 = 3 must divide the world size 2" in out
    assert not tiny.out.exists()
