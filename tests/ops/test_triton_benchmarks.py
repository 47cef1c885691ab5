"""The GPU benchmarks run: at tiny sizes, on the CPU, their kernels in the interpreter, with all of their own checks."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("name", ["grouped_mm", "experts", "__main__"])
def test_without_a_gpu_it_says_so(name, fresh_python):
    pytest.importorskip("triton")
    code = f"import sys, torch; torch.cuda.is_available = lambda: False; sys.argv = ['{name}']; "
    code += f"import benchmarks.gpu.{name} as b\ntry: b.main(b.Options())\nexcept SystemExit as error: print(error)"
    assert "no GPU here: run on one, or with --dry-run" in fresh_python(code).stdout
