"""``impl="triton"`` of grouped_mm: values, in every dtype, layout and stride, on the launches of several GPUs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.ops import accumulate_weight_grad, grouped_mm
from moesaic.ops.triton import available, device, tuner
from tests.ops.oracle import check, exact, run, uninitialised_memory_is_nan
from tests.ops.strategies import FORMS, layout, problem, problems
from tests.ops.test_grouped_mm import EDGES

DTYPES = available.DTYPES
KINDS = ("8.0", "9.0")


@settings(max_examples=10)
@given(data=st.data())
def test_exact_values(data):
    p = data.draw(problems(exact=True, dtypes=DTYPES))
    with uninitialised_memory_is_nan():
        check(p, run("triton", p))


@settings(max_examples=6)
@given(data=st.data())
def test_accuracy(data):
    p = data.draw(problems(exact=False, dtypes=DTYPES))
    check(p, run("triton", p))


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    for K, N in ((40, 70), (0, 3)):
        p = problem(EDGES[edge], K, N, torch.bfloat16)
        with uninitialised_memory_is_nan():
            check(p, run("triton", p))


@pytest.mark.parametrize("capability", KINDS)
@pytest.mark.parametrize("sizes", [[[3, 0, 9], [1, 2, 0]], [[33, 5, 64], [20, 0, 9]], [[300, 0, 70], [130, 5, 64]]])
def test_launches_of_gpus(on, capability, sizes):
    # Few, some and many rows a group: a configuration each. 40 x 72 is aligned for descriptors, 41 x 71 is not.
    on(capability)
    for form, K, N, strides in (
        ("flat", 40, 72, "contiguous"),
        ("own", 40, 72, "transposed"),
        ("shared", 41, 71, "contiguous"),
    ):
        p = problem(layout(form, sizes, slack=2), K, N, torch.bfloat16, strides=("contiguous", strides, "sliced"))
        with uninitialised_memory_is_nan():
            check(p, run("triton", p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced", "expanded"])
def test_descriptors_are_used_where_a_weight_is_aligned(strides, dtype):
    tiles = available.load("tiles")
    w = problem(layout("flat", [[2, 3]]), 40, 72, dtype, strides=("contiguous", strides, "contiguous")).w
    form = {"contiguous": 1, "transposed": 2}.get(strides, 0) if dtype != torch.float32 else 0
    assert tiles.as_weight(w, 16, 32, device.nvidia((9, 0), 3)).form == form
    assert tiles.as_weight(w, 16, 32, device.nvidia((8, 0), 3)).form == 0


@pytest.mark.parametrize("sizes", [[[2, 130, 0], [3, 70, 1]], [[0, 39], [1, 2]]], ids=["many chunks", "two chunks"])
@pytest.mark.parametrize("form", FORMS)
def test_a_hot_expert_is_split(monkeypatch, form, sizes):
    # A gradient of one block, fewer than multiprocessors: the rows of the second expert are summed in chunks.
    kernels = available.load("weight_grad")
    added = []
    add = kernels._add_partials
    monkeypatch.setattr(kernels, "_add_partials", lambda *args: (added.append(args[1]), add(*args)))
    p = problem(layout(form, sizes), 16, 30, torch.bfloat16)
    with uninitialised_memory_is_nan():
        check(p, run("triton", p))
    [chunks] = added
    assert chunks.num_splits.item() > 0
    assert chunks.splits[0, 2] > 1


@pytest.mark.parametrize("into_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[[2, 130, 0], [3, 70, 1]], [[2, 0], [0, 1]]], ids=["split", "whole"])
def test_weight_gradients_are_added_to_what_is_there(sizes, into_dtype):
    p = problem(layout("shared", sizes, slack=1), 16, 30, torch.bfloat16)
    into = torch.randint(-8, 9, p.w.shape, generator=torch.Generator().manual_seed(1)).to(into_dtype)
    expected = (into.double() + exact(p).gw).to(into_dtype)
    with uninitialised_memory_is_nan():
        accumulate_weight_grad(into, p.x, p.grad, p.group_sizes, impl="triton")
    assert torch.equal(into, expected)


def test_experts_without_rows_keep_their_values(monkeypatch, tmp_path):
    # Tuning runs a launch many times, and not on the tensor that is added to.
    monkeypatch.setenv("MOESAIC_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("MOESAIC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "neighbours", lambda default: [default])
    p = problem(layout("flat", [[3, 0, 6]], slack=2), 8, 16, torch.float32)
    into = torch.zeros(3, 8, 16)
    into[1] = torch.inf
    accumulate_weight_grad(into, p.x, p.grad, p.group_sizes, impl="triton")
    assert into[1].isinf().all()
    assert torch.equal(into[[0, 2]].double(), exact(p).gw[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_of_long_sums(on, dtype):
    on("9.0")
    p = problem(layout("shared", [[300, 0, 257], [129, 400, 1]], slack=3), 500, 16, dtype, exact=False)
    check(p, run("triton", p), margin=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_call_same_bits(dtype):
    p = problem(layout("shared", [[70, 0, 50], [9, 30, 2]], slack=3), 40, 33, dtype, exact=False)
    for a, b in zip(run("triton", p), run("triton", p), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_infinities_stay_in_their_row():
    p = problem(layout("flat", [[2, 3]], slack=1), 4, 4, torch.float32)
    p.x[1] = torch.inf
    y = run("triton", p).y
    assert y[[0, 2, 3, 4, 5]].isfinite().all()
    assert torch.equal(y[1].nan_to_num(7, 8, 9), (p.x[1] @ p.w[0]).nan_to_num(7, 8, 9))


def test_fp32_result_of_half_operands():
    p = problem(layout("own", [[20, 0, 37], [31, 9, 1]], slack=3), 50, 33, torch.bfloat16)
    check(p, run("triton", p, torch.float32), out_dtype=torch.float32)


def test_gradient_of_gradient():
    p = problem(layout("flat", [[2, 3]], slack=1), 5, 4, torch.float32, exact=False)
    results = []
    for impl in ("triton", "torch"):
        x, w = (t.nan_to_num().requires_grad_() for t in (p.x.clone(), p.w.clone()))
        y = grouped_mm(x, w, p.group_sizes, impl=impl)
        gx, gw = torch.autograd.grad((y**2).sum(), (x, w), create_graph=True)
        results.append(torch.autograd.grad((gx**2).sum() + (gw**2).sum(), (x, w)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_tf32_only_where_torch_allows_it():
    tiles = available.load("tiles")
    assert tiles.precision(torch.float32) == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert tiles.precision(torch.float32) == "tf32"
        assert tiles.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
