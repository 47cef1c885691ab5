"""grouped_mm: values, in every dtype, layout and stride, of every implementation."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.ops import grouped_mm, implementations
from moesaic.ops.processor import Processor
from tests.ops.cpu_isa import CPU, dtypes_of, needs_kernels, skip_unless_supported
from tests.ops.oracle import HALF, check, exact, run, run_operators, uninitialised_memory_is_nan
from tests.ops.strategies import DTYPES, FORMS, layout, problem, problems, without_last

OPERATORS = ("reference", "torch", *CPU)
IMPLS = (*OPERATORS, "tiled")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

EDGES = {
    "one expert": layout("flat", [[5]]),
    "idle experts": layout("flat", [[0, 3, 0, 0, 4, 0]]),
    "everything on one": layout("flat", [[0, 0, 70, 0]]),
    "all empty": layout("flat", [[0, 0, 0]], slack=4),
    "zero rows": layout("flat", [[0, 0, 0]]),
    "no experts": layout("flat", [[]], slack=3),
    "no experts, no rows": layout("flat", [[]]),
    "rows past the end": layout("flat", [[2, 1]], slack=5),
    "full tiles": layout("flat", [[64, 128, 64]]),
    "tiles and one row": layout("flat", [[65, 1, 129]], slack=1),
    "single block": layout("own", [[2, 3]], slack=2),
    "single shared block": layout("shared", [[2, 3]], slack=2),
    "own experts": layout("own", [[2, 0, 3], [0, 0, 0], [1, 5, 1]], slack=1),
    "shared experts": layout("shared", [[2, 0, 3], [0, 0, 0], [1, 0, 1]], slack=1),
    "shared and idle": layout("shared", [[0, 0], [0, 0]], slack=3),
    "fewer experts": layout("own", [[2, 0, 3], [0, 4, 0], [1, 0, 0]], slack=1, missing=1),
    "blocks without expert": layout("own", [[2, 3], [1, 1], [2, 0], [0, 0]], slack=2, missing=3),
    "one group a block": layout("own", [[3], [1], [0]]),
    "one shared expert": layout("shared", [[3], [1], [0]]),
    "no groups": layout("own", [[], []], slack=2),
    "no blocks": layout("own", []),
}

# torch._grouped_mm takes at most 1,023.
MANY_GROUPS = {
    "2,100 groups": layout("flat", [[0, 1, 2] * 700], slack=3),
    "1,100 own groups": layout("own", [[0, 1] * 275, [1, 0] * 275], slack=1),
    "1,100 shared groups": layout("shared", [[0, 1] * 550, [2, 0] * 550]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=3 * settings().max_examples)
@given(data=st.data())
def test_exact_values(impl, device, data):
    skip_unless_supported(impl, torch.float32, device)
    p = data.draw(problems(exact=True, device=device, dtypes=dtypes_of(impl)))
    with uninitialised_memory_is_nan():
        check(p, run(impl, p))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=2 * settings().max_examples)
@given(data=st.data())
def test_accuracy(impl, device, data):
    skip_unless_supported(impl, torch.float32, device)
    p = data.draw(problems(exact=False, device=device, dtypes=dtypes_of(impl)))
    check(p, run(impl, p))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("impl", IMPLS)
def test_edges(impl, edge, dtype, device):
    skip_unless_supported(impl, dtype, device)
    for K, N in ((3, 5), (8, 16), (0, 3), (3, 0), (1, 1), (0, 0)):
        p = problem(EDGES[edge], K, N, dtype, device=device)
        with uninitialised_memory_is_nan():
            check(p, run(impl, p))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_operators_take_any_number_of_matrices(impl, device):
    skip_unless_supported(impl, torch.float32, device)
    # A rank's shard may have fewer than the public function allows, or none.
    for missing in range(7):
        sizes = without_last([[2, 70], [0, 3], [1, 2]], missing)
        p = problem(layout("own", sizes, slack=1, missing=missing), 8, 5, torch.float32, device=device)
        with uninitialised_memory_is_nan():
            check(p, run(impl, p) if impl == "tiled" else run_operators(impl, p))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("missing", [1, 3, 4])  # two matrices would be shared
def test_tiles_leave_out_rows_of_groups_without_expert(missing, device):
    p = problem(layout("own", [[2, 1], [70, 1]], slack=1), 8, 5, torch.float32, device=device)
    w = p.w[: 4 - missing]
    fewer = replace(p, w=w, experts=[e if e < len(w) else -1 for e in p.experts])
    check(fewer, run("tiled", fewer))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("many", MANY_GROUPS)
@pytest.mark.parametrize("impl", IMPLS)
def test_many_groups(impl, many, device):
    skip_unless_supported(impl, torch.bfloat16, device)
    p = problem(MANY_GROUPS[many], 8, 5, torch.bfloat16, device=device)
    with uninitialised_memory_is_nan():
        check(p, run(impl, p))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_accuracy_of_long_sums(impl, dtype):
    skip_unless_supported(impl, dtype)
    # Long enough for an accumulation in half precision, or one that rounds once a block, to stand out.
    for form in FORMS:
        p = problem(layout(form, [[300, 0, 257], [129, 400, 1]], slack=3), 500, 16, dtype, exact=False)
        check(p, run(impl, p), margin=1.5)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", OPERATORS)
def test_same_call_same_bits(impl, dtype, device):
    skip_unless_supported(impl, dtype, device)
    check_same_bits(impl, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_call_same_bits_by_tiles(one_thread, dtype, device):
    # The tiles are for other devices: with several threads CPU's index_put is not deterministic.
    check_same_bits("tiled", dtype, device)


def check_same_bits(impl: str, dtype: torch.dtype, device: str) -> None:
    for form in FORMS:
        p = problem(layout(form, [[500, 0, 1500], [900, 300, 2]], slack=3), 128, 96, dtype, exact=False, device=device)
        first = run(impl, p)
        for _ in range(3):
            for a, b in zip(first, run(impl, p), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_rows_are_not_read(impl, form, poison):
    p = problem(layout(form, [[2, 0, 3], [0, 4, 0]], slack=3), 8, 8, torch.float32)
    padding = torch.tensor(p.experts) < 0
    p.x[padding] = poison
    p.grad[padding] = poison
    results = run(impl, p)
    assert not results.y[padding].any()
    assert not results.gx[padding].any()
    check(p, results)


@pytest.mark.parametrize("impl", IMPLS)
def test_infinities_stay_in_their_row(impl):
    # Rows fill part of a tile: what pads it must not turn a neighbour's Inf into a NaN.
    p = problem(layout("flat", [[2, 3]], slack=1), 4, 4, torch.float32)
    p.x[1] = torch.inf
    y = run(impl, p).y
    assert not y[[0, 2, 3, 4, 5]].isinf().any()
    assert not y[[0, 2, 3, 4, 5]].isnan().any()
    assert torch.equal(y[1].nan_to_num(7, 8, 9), (p.x[1] @ p.w[0]).nan_to_num(7, 8, 9))


@pytest.mark.parametrize("impl", OPERATORS)
def test_gradient_of_a_sum_has_stride_0(impl):
    p = problem(layout("flat", [[2, 0, 3]], slack=2), 5, 3, torch.float32)
    x, w = p.x.requires_grad_(), p.w.requires_grad_()
    grouped_mm(x, w, p.group_sizes, impl=impl).sum().backward()
    ones = problem(layout("flat", [[2, 0, 3]], slack=2), 5, 3, torch.float32)
    ones.grad.fill_(1)
    truth = exact(ones)
    assert torch.equal(x.grad.double(), truth.gx)
    assert torch.equal(w.grad.double(), truth.gw)


@pytest.mark.parametrize("impl", OPERATORS)
def test_only_the_gradients_asked_for_are_computed(impl):
    p = problem(layout("flat", [[2, 3]]), 4, 3, torch.float32)
    truth = exact(p)
    x, w = p.x.clone().requires_grad_(), p.w.clone().requires_grad_()
    with CalledOps() as ops:
        [gx] = torch.autograd.grad(grouped_mm(x, p.w, p.group_sizes, impl=impl), x, p.grad)
    assert ops.names == ["grouped_mm", "grouped_mm_input_grad"]
    with CalledOps() as ops:
        [gw] = torch.autograd.grad(grouped_mm(p.x, w, p.group_sizes, impl=impl), w, p.grad)
    assert ops.names == ["grouped_mm", "grouped_mm_weight_grad"]
    assert torch.equal(gx.double(), truth.gx)
    assert torch.equal(gw.double(), truth.gw)
    assert not grouped_mm(p.x, p.w, p.group_sizes, impl=impl).requires_grad


class CalledOps(TorchDispatchMode):
    """The operators of this library that run inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moesaic":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_fp32_result_of_half_operands(impl, form, dtype):
    skip_unless_supported(impl, dtype)
    sizes = [[20, 0, 37], [31, 9, 1]]
    for is_exact in (True, False):
        p = problem(layout(form, sizes, slack=3), 50, 33, dtype, exact=is_exact)
        # The gradient comes in fp32, and is rounded to the operands' type as if the product had returned that.
        check(p, run(impl, p, torch.float32), out_dtype=torch.float32)


@pytest.mark.parametrize("impl", OPERATORS)
def test_out_dtype_of_the_operands_is_the_default(impl):
    p = problem(layout("flat", [[2, 3]], slack=1), 4, 3, torch.float32)
    y = grouped_mm(p.x, p.w, p.group_sizes, impl=impl, out_dtype=torch.float32)
    assert torch.equal(y, grouped_mm(p.x, p.w, p.group_sizes, impl=impl))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [40, 100])
def test_default_implementation(rows, dtype, monkeypatch):
    # Where torch has the faster products of many rows, in fp32 and without the gradients'.
    monkeypatch.setattr(implementations, "processor", lambda: Processor("Intel", False, "avx512", "avx512"))
    p = problem(layout("shared", [[rows, 3], [1, 2 * rows]]), 65, 33, dtype, exact=False)
    kernels = "cpu" if dtype in dtypes_of("cpu") else "torch"
    names = ("torch" if dtype == torch.float32 and rows == 100 else kernels, kernels, kernels)
    for i, name in enumerate(names):
        assert torch.equal(run(None, p)[i], run(name, p)[i])


@pytest.mark.parametrize("impl", [None, "reference", "torch"])
def test_the_gradient_of_turned_weights_lies_as_they_do(impl):
    p = problem(layout("flat", [[3, 0, 6]]), 8, 16, torch.float32, strides=("contiguous", "transposed", "contiguous"))
    gw = torch.ops.moesaic.grouped_mm_weight_grad(p.x, p.grad, p.group_sizes, p.w, impl)
    assert gw.mT.is_contiguous()
    assert torch.equal(gw, exact(p).gw.float())
