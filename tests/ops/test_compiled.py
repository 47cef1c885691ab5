"""torch.compile(fullgraph=True) of the operators, where no run-time checks are."""

import shutil
from pathlib import Path

import pytest

from tests.ops.cpu_isa import needs_kernels

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("compiled.py")


def test_graphs_are_whole_and_serve_every_size(forked_python):
    forked_python(PROGRAM, "aot_eager")


# The Triton kernels are compiled in their interpreter's process: tests/ops/interpreted.
@pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("cpu", marks=needs_kernels)])
def test_every_implementation(forked_python, impl):
    forked_python(PROGRAM, impl)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor(fresh_python):
    fresh_python(PROGRAM, "inductor")
