"""The CPU kernels' library: that it is here and loads, says what it runs on, and that moesaic works without it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from moesaic.ops import library
from moesaic.ops.native import Kernels, kernels
from moesaic.ops.processor import INSTRUCTION_SETS, kernels_for, processor
from tests.ops.cpu_isa import HERE

needs_kernels = pytest.mark.skipif(not isinstance(kernels(), Kernels), reason=f"no CPU kernels: {kernels()}")

# Vendor, whether there is AMX, and the best instruction set: where torch's products are faster in some cases.
IN_PART = {
    ("AMD", False, "avx2"): ", for float32 in part and bfloat16",
    ("Intel", True, "avx512_bf16"): ", for float32 and bfloat16 in part",
    ("Intel", False, "avx512"): ", for float32 in part and bfloat16",
    ("Intel", False, "avx512_bf16"): ", for float32 in part and bfloat16",
}

_INFO = "import sys; from moesaic.cli import main; sys.exit(main(['info']))"


def test_the_kernels_are_here_where_they_are_insisted_on():
    if not os.environ.get("MOESAIC_REQUIRE_CPU_KERNELS"):
        pytest.skip("MOESAIC_REQUIRE_CPU_KERNELS is not set")
    assert isinstance(kernels(), Kernels), kernels()


@needs_kernels
def test_info_names_the_instruction_set(fresh_python, monkeypatch):
    usual = processor().usual
    for name in (HERE[0], usual, HERE[-1]):
        monkeypatch.setenv("MOESAIC_CPU_ISA", name)
        (kernels,) = re.findall(r"^CPU kernels: (.*)$", fresh_python(_INFO).stdout, re.MULTILINE)
        # In fp32 all with AVX-512 are the same. Others than the usual one run only where they are asked for.
        is_usual = kernels_for(name, torch.float32) == kernels_for(usual, torch.float32)
        in_part = IN_PART.get(processor()[:3], "")
        in_fp32 = ", for float32" + " in part" * ("float32 in part" in in_part)
        expected = name + (in_part if name == usual else in_fp32)
        assert kernels == (expected if is_usual else f'none without impl="cpu"; {name} with it')


def test_info_says_why_there_are_no_kernels(fresh_python, monkeypatch):
    monkeypatch.setenv("MOESAIC_CPU_ISA", "none")
    said = fresh_python(_INFO).stdout
    assert "CPU kernels: none, " in said
    assert "pool of large CPU results: off" in said


@needs_kernels
def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("MOESAIC_CPU_ISA", "sse2")
    with pytest.raises(ValueError, match=r"MOESAIC_CPU_ISA: got 'sse2'; choose one of \('none', 'avx2'"):
        processor.__wrapped__()


def test_a_library_that_was_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PATH", tmp_path / "libmoesaic_cpu.so")
    assert "they were not built" in kernels.__wrapped__()


@needs_kernels
def test_a_library_of_other_sources(monkeypatch):
    monkeypatch.setattr(library, "ABI", -1)
    assert "was built from other sources" in kernels.__wrapped__()


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="reads /proc and ELF")
@pytest.mark.parametrize("order", ["moesaic, torch", "torch, moesaic"])
def test_one_openmp_for_torch_and_the_kernels(fresh_python, order):
    # Two of them would have twice the threads, which fight for the cores.
    said = fresh_python(
        f"import {order}\nfrom moesaic.ops.native import kernels; kernels()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    assert said.stdout.strip() == "1"


@needs_kernels
@pytest.mark.skipif(not shutil.which("nm"), reason="reads symbols")
def test_only_the_c_interface_is_exported():
    listed = subprocess.run(["nm", "-DC", "--defined-only", library.PATH], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    ours = {name for name in names if "moesaic" in name}
    assert "moesaic_cpu_grouped_mm" in ours
    assert {name for name in ours if not name.startswith(("moesaic_cpu_", "moesaic_pool_"))} == set()


@needs_kernels
def test_instruction_sets_have_the_kernels_names():
    name = kernels().library.moesaic_cpu_isa_name
    numbers = range(1, len(INSTRUCTION_SETS))
    assert [name(isa).decode() for isa in numbers] == list(INSTRUCTION_SETS[1:])
    assert name(0) is None
    assert name(len(INSTRUCTION_SETS)) is None


def test_arm_is_declined_by_name(monkeypatch):
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    assert kernels.__wrapped__() == "there are none for Arm yet"
