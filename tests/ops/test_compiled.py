"""torch.compile(fullgraph=True) of the operators, where no run-time checks are."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("compiled.py")


def test_graphs_are_whole_and_serve_every_size(forked_python):
    forked_python(PROGRAM, "aot_eager")


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor(fresh_python):
    fresh_python(PROGRAM, "inductor")
