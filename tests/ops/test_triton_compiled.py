"""The Triton kernels compiled ahead of time, in their default configurations, for GPUs that need not be there.

A sample: every form of the experts in bf16 for one GPU, the largest blocks of SiLU for all GPUs, and of the form that
needs the most registers in every dtype. The long tests ask the same of all forms in all dtypes and blocks for all GPUs.
"""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("8.0", "9.0", "10.0")
SHARED_LIMITS = {"8.0": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10}
DTYPES = ("bfloat16", "float16", "float32")
GREEDY = ("gelu, biases",)
FORMS = (*GREEDY, "silu, biases", "silu", "silu, no gate", "clamped_swiglu", "clamped_swiglu, biases")
NUMBERS = ("few", "some", "many")
# In fp32 some and many rows are computed in the same blocks, and a kernel is listed once.
LISTED = {"bfloat16": NUMBERS, "float16": NUMBERS, "float32": ("few", "some")}
# ptxas of triton 3.6.0 keeps two registers of the first in memory, at 96 of 255; that of 3.9.0 four of the second.
SPILLED_BYTES = {
    ("up_projection_kernel", "10.0", "float16", "some", "silu, biases"): 8,
    ("down_gradient_kernel", "10.0", "bfloat16", "many", "silu"): 16,
}
OF_EXPERTS = {"up_projection_kernel", "down_gradient_kernel"}
PRODUCTS = OF_EXPERTS | {"grouped_mm_kernel", "weight_grad_kernel"}
LONG = [pytest.mark.long, pytest.mark.timeout(3600)]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module", params=[pytest.param("sample", marks=LONG[:1]), pytest.param("all", marks=LONG)])
def rows(request, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("compiled")
    program = [sys.executable, "-m", "benchmarks.gpu.compile_table", "--json", folder / "table.json"]
    done = subprocess.run(
        [*program, *(["--sample"] if request.param == "sample" else [])],
        env=os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "table.json").read_text())["rows"]


def test_every_kernel_is_compiled(rows):
    # Each kernel that multiplies, for each GPU, and for few, some and many rows.
    expected = {(kernel, c, "many") for kernel in PRODUCTS for c in CAPABILITIES}
    expected |= {(kernel, "9.0", n) for kernel in PRODUCTS for n in NUMBERS}
    assert expected <= {(r["kernel"], r["capability"], r["rows"]) for r in rows if r["dtype"] == "bfloat16"}
    names = {row["kernel"] for row in rows}
    assert names >= {"group_bounds_kernel", "tile_map_kernel", "chunk_map_kernel", "combine_kernel"}


def test_forms_are_compiled_in_every_dtype(rows):
    found = {
        (row["kernel"], row["dtype"], row["form"]) for row in rows if row["rows"] in ("many", LISTED[row["dtype"]][-1])
    }
    for dtype in DTYPES:
        forms = FORMS if dtype == "bfloat16" else GREEDY
        assert {(kernel, dtype, form) for kernel in OF_EXPERTS for form in forms} <= found
        assert {(kernel, dtype, "") for kernel in PRODUCTS - OF_EXPERTS} <= found


@pytest.mark.parametrize("rows", [pytest.param("all", marks=LONG)], indirect=True)
def test_every_form_is_compiled_in_every_dtype_for_every_gpu(rows):
    found = {tuple(row[name] for name in ("kernel", "form", "capability", "dtype", "rows")) for row in rows}
    for dtype, numbers in LISTED.items():
        assert set(itertools.product(OF_EXPERTS, FORMS, CAPABILITIES, [dtype], numbers)) - found == set()
        assert set(itertools.product(PRODUCTS - OF_EXPERTS, [""], CAPABILITIES, [dtype], numbers)) - found == set()


def test_nothing_else_spills(rows):
    spilled = {
        tuple(row[name] for name in ("kernel", "capability", "dtype", "rows", "form")): row["spilled_bytes"]
        for row in rows
        if row["spilled_bytes"]
    }
    assert spilled.items() <= SPILLED_BYTES.items()


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared_bytes"] > SHARED_LIMITS[row["capability"]]] == []


@pytest.mark.parametrize(("capability", "instruction"), [("8.0", "mma"), ("9.0", "wgmma"), ("10.0", "tcgen05")])
def test_products_use_the_matrix_instructions_of_the_gpu(rows, capability, instruction):
    # Tiles of 16 rows are below the 64 of wgmma and tcgen05.
    found = {
        (row["kernel"], row["matrix_instruction"])
        for row in rows
        if row["capability"] == capability and row["kernel"] in PRODUCTS and row["rows"] != "few"
        if row["dtype"] != "float32"
    }
    assert found == {(kernel, instruction) for kernel in PRODUCTS}


def test_weights_and_rows_in_order_come_by_descriptor_on_hopper_and_later(rows):
    by_descriptor = {(r["kernel"], r["capability"]) for r in rows if r["has_tma"] and r["kernel"] in PRODUCTS}
    assert by_descriptor == set(itertools.product(PRODUCTS, ("9.0", "10.0"))) - {("weight_grad_kernel", "10.0")}


def test_warps_are_specialized_where_triton_can(rows):
    # Of many rows, on 9.0: four warps that load beside eight that multiply, but for the one with results in fp32.
    many = Counter(
        (row["capability"], row["config"].split(", ")[1])
        for row in rows
        if (row["kernel"], row["rows"], row["dtype"]) == ("grouped_mm_kernel", "many", "bfloat16")
    )
    assert set(many) == {("8.0", "8 warps"), ("9.0", "8 warps"), ("9.0", "12 warps"), ("10.0", "8 warps")}
    assert many["9.0", "8 warps"] == 1
    # In Gluon, off by default.
    [gathers] = {
        (row["capability"], row["rows"], row["matrix_instruction"], row["has_tma"])
        for row in rows
        if row["kernel"] == "by_warps_kernel"
    }
    assert gathers == ("9.0", "many", "wgmma", True)
