"""Every example runs, and so do those of the README."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.cli import main

ROOT = Path(__file__).parents[1]
# A gloo thread that comes too late when Python ends, on a busy machine; after the script did all it does
# (pytorch/pytorch#190489).
TORCH_ABORTS_AT_EXIT = "terminate called without an active exception"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: Path) -> str:
    """Run a script, on four ranks if it makes a process group; give back what it printed."""
    launcher = [sys.executable]
    if "init_process_group" in script.read_text():
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = start([*launcher, str(script)])
    if TORCH_ABORTS_AT_EXIT in done.stderr:
        done = start([*launcher, str(script)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MOESAIC_NO_TYPECHECK": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script):
    assert run(script)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


LAYER, OPERATOR = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_trains_a_layer_on_ranks(tmp_path):
    script = tmp_path / "layer.py"
    script.write_text(LAYER)
    assert "(Shard(dim=0), Shard(dim=2))" in run(script)


@pytest.mark.usefixtures("unchecked")
def test_readme_proves_an_operator(tmp_path, monkeypatch, capsys):
    [command] = re.findall(r"^moesaic (prove .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "mylib.py").write_text(OPERATOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Fewer ranks than by default, to save time.
    assert main([*command.split(), "--axes", "2", "--meshes"]) == 0
    assert "nothing wrong, nothing missing" in capsys.readouterr().out
