"""Every example runs, and so does the README's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for i, block in enumerate(blocks):
        script = tmp_path / f"block{i}.py"
        script.write_text(block)
        run(script)
