"""The GPU benchmarks run: at tiny sizes, on the CPU, their kernels in the interpreter, with all of their own checks."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# The kernels have tests of their own in the interpreter.
@pytest.mark.long
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_dry_run_of_all():
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run"],
        env=os.environ | {"MOESAIC_NO_TYPECHECK": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "one pass: every kernel right" in done.stdout
    assert done.stdout.count("dry run: nothing saved") == 2
    aims = done.stdout.partition("All aims")[2]
    assert "fine-grained both passes" in aims
    assert "grouped_mm, groups of <= 64 rows" in aims


_ALL = """
import importlib
import torch

torch.cuda.is_available = lambda: False
for name in ("one_pass", "grouped_mm", "experts", "__main__"):
    benchmark = importlib.import_module(f"benchmarks.gpu.{name}")
    options = [benchmark.Options()] if hasattr(benchmark, "Options") else []
    try:
        benchmark.main(*options)
    except SystemExit as error:
        print(f"{name}: {error}")
"""


def test_without_a_gpu_they_say_so(forked_python):
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    expected = "no GPU here: run on one, or with --dry-run to see that the script works"
    said = forked_python(_ALL).stdout
    assert said.splitlines() == [f"{name}: {expected}" for name in ("one_pass", "grouped_mm", "experts", "__main__")]
