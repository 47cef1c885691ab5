"""The overrides on two ranks, with the pinned torch. All else in this folder needs a venv of its own.

One of them runs as the example does.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torchtitan.case import Case, Record, merged, run
from tests.torchtitan.compare import assert_equal

# Beside the packages of the venv and not among them: `make setup` puts it there.
FOLDER = Path(sys.prefix) / "torchtitan"
if not FOLDER.exists() and importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed; `make setup` does", allow_module_level=True)

STOCK = Case(steps=1)
OURS = [Case(override="experts", ep=2, steps=1), Case(override="routed_experts", tp=2, ep=2, etp=2, steps=1)]


def run_all(example: list[str]) -> list[Record]:
    if FOLDER.exists():
        sys.path.append(str(FOLDER))
    return [run(STOCK), run(OURS[0]), run(OURS[1], example)]


@pytest.mark.slow
def test_overrides_equal_stock(ranks):
    script = Path(__file__).parents[2] / "examples" / "torchtitan" / "small_on_cpu.sh"
    command = ["bash", str(script), "--training.steps", "1"]
    said = subprocess.run(command, env=os.environ | {"PYTHON": "echo"}, text=True, capture_output=True, check=True)
    example = said.stdout.partition(" -m tests.torchtitan.train ")[2].split()
    want, *got = (merged(list(records)) for records in zip(*ranks(run_all, 2, example), strict=True))
    for case, record in zip(OURS, got, strict=True):
        assert_equal(record, want, case)
