"""The Triton kernels compiled ahead of time, in their default configurations, for GPUs that need not be there.

A sample: every form of the experts in every dtype for one GPU at least, and SiLU in bf16 for all of them.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("8.0", "9.0", "10.0")
SHARED_LIMITS = {"8.0": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10}
DTYPES = ("bfloat16", "float16", "float32")
FORMS = ("silu", "silu, biases", "silu, no gate", "gelu, biases", "clamped_swiglu", "clamped_swiglu, biases")
PRODUCTS = {"grouped_mm_kernel", "up_projection_kernel", "down_gradient_kernel", "weight_grad_kernel"}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("compiled")
    program = [sys.executable, ROOT / "benchmarks" / "gpu" / "compile_table.py"]
    subprocess.run(
        [*program, "--sample", "--json", folder / "table.json"],
        env=os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")},
        check=True,
        capture_output=True,
    )
    return json.loads((folder / "table.json").read_text())["rows"]


def test_every_kernel_is_compiled(rows):
    # For each GPU each kernel that multiplies, for few, some and many rows.
    expected = {(kernel, c, n) for kernel in PRODUCTS for c in CAPABILITIES for n in ("few", "some", "many")}
    assert expected <= {(r["kernel"], r["capability"], r["rows"]) for r in rows if r["dtype"] == "bfloat16"}
    names = {row["kernel"] for row in rows}
    assert names >= {"group_bounds_kernel", "tile_map_kernel", "chunk_map_kernel", "combine_kernel"}


def test_every_form_is_compiled_in_every_dtype(rows):
    kernels = {(row["kernel"], row["dtype"], row["form"]) for row in rows if row["rows"] == "many"}
    for dtype in DTYPES:
        for form in FORMS:
            assert ("up_projection_kernel", dtype, form) in kernels
            assert ("down_gradient_kernel", dtype, form) in kernels
        assert {(kernel, dtype, "") for kernel in ("grouped_mm_kernel", "weight_grad_kernel")} <= kernels


def test_nothing_spills(rows):
    assert [row for row in rows if row["spilled_bytes"]] == []


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared_bytes"] > SHARED_LIMITS[row["capability"]]] == []


@pytest.mark.parametrize(("capability", "instruction"), [("8.0", "mma"), ("9.0", "wgmma"), ("10.0", "tcgen05")])
def test_products_use_the_matrix_instructions_of_the_gpu(rows, capability, instruction):
    # Tiles of 16 rows are below the 64 of wgmma and tcgen05.
    found = {
        (row["kernel"], row["rows"], row["matrix_instruction"])
        for row in rows
        if row["capability"] == capability and row["kernel"] in PRODUCTS and row["rows"] != "few"
        if row["dtype"] != "float32"
    }
    assert found == {(kernel, n, instruction) for kernel in PRODUCTS for n in ("some", "many")}


def test_weights_come_by_descriptor_on_hopper_and_later(rows):
    by_descriptor = {(row["kernel"], row["capability"]) for row in rows if row["has_tma"]}
    assert by_descriptor == {(k, c) for k in PRODUCTS - {"weight_grad_kernel"} for c in ("9.0", "10.0")}
