"""accumulate_weight_grad: what is added, to which buffers, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.ops import accumulate_weight_grad
from tests.ops.cpu_isa import CPU, dtypes_of, skip_unless_supported
from tests.ops.oracle import exact
from tests.ops.strategies import layout, problem, problems

IMPLS = ("reference", "torch", None, *CPU)
FLAT = layout("flat", [[3, 0, 6]], slack=2)


@pytest.mark.parametrize("impl", IMPLS)
@given(data=st.data())
def test_it_adds_the_weight_gradient(impl, data):
    p = data.draw(problems(exact=True, dtypes=dtypes_of(impl)))
    # Whole numbers again: sums are exact where they are rounded once, in fp32.
    dtype = data.draw(st.sampled_from([torch.float32, p.x.dtype])) if p.x.dtype != torch.float64 else torch.float64
    generator = torch.Generator().manual_seed(1)
    into = torch.randint(-8, 9, p.w.shape, generator=generator).to(dtype)
    expected = (into.double() + exact(p).gw).to(dtype)
    before = into.data_ptr()
    accumulate_weight_grad(into, p.x, p.grad, p.group_sizes, impl=impl)
    assert into.data_ptr() == before
    assert torch.equal(into, expected)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 257), (torch.float16, 2049)])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_half_precision_buffer_is_rounded_once(impl, dtype, rows):
    skip_unless_supported(impl, dtype)
    # The sum is the first whole number that the dtype lacks; with one more it has it again.
    ones, into = torch.ones(rows, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype)
    accumulate_weight_grad(into, ones, ones, torch.tensor([rows]), impl=impl)
    assert into.item() == rows + 1


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_without_rows_keep_their_values(impl):
    p = problem(FLAT, 8, 16, torch.float32)
    into = torch.full((3, 8, 16), torch.inf)
    into[[0, 2]] = 0
    accumulate_weight_grad(into, p.x, p.grad, p.group_sizes, impl=impl)
    assert torch.equal(into[1], torch.full((8, 16), torch.inf))


@pytest.mark.parametrize("impl", [None, "reference", "torch"])
def test_opcheck(impl):
    p = problem(layout("flat", [[3, 0, 6]]), 8, 16, torch.float32)
    args = (torch.zeros(3, 8, 16), p.x, p.grad, p.group_sizes, impl)
    torch.library.opcheck(torch.ops.moesaic.grouped_mm_accumulate_weight_grad, args)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_it_alone(impl):
    p = problem(FLAT, 8, 16, torch.float32, exact=False)
    inside, outside = torch.zeros(3, 8, 16), torch.zeros(3, 8, 16)
    accumulate_weight_grad(outside, p.x, p.grad, p.group_sizes, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        accumulate_weight_grad(inside, p.x, p.grad, p.group_sizes, impl=impl)
    assert torch.equal(inside, outside)


def test_autograd_is_told_of_the_change():
    p = problem(FLAT, 8, 16, torch.float32)
    into = torch.zeros(3, 8, 16)
    y = (torch.ones(3, 8, 16, requires_grad=True) * into).sum()
    accumulate_weight_grad(into, p.x, p.grad, p.group_sizes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_fake_tensors():
    p = problem(FLAT, 8, 16, torch.bfloat16)
    with FakeTensorMode() as mode:
        into, *rest = (mode.from_tensor(t) for t in (torch.zeros(3, 8, 16), p.x, p.grad, p.group_sizes))
        accumulate_weight_grad(into, *rest)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"into": torch.zeros(3, 16, 8).mT}, ValueError, r"into: has strides \(128, 1, 8\); give a contiguous tensor"),
        ({"into": torch.zeros(3, 8, 17)}, ValueError, r"grad: expected \[11, 17\] to match x and into, got \[11, 16\]"),
        ({"into": torch.zeros(2, 8, 16)}, ValueError, "one size for each of the 2 matrices of into, got 3"),
        ({"into": torch.zeros(3, 9, 16)}, ValueError, r"into: expected \[E, 8, N\] to match x"),
        (
            {"into": torch.zeros(3, 8, 16).half()},
            TypeError,
            "into: got torch.float16 for operands of torch.float32; give",
        ),
        ({"grad": torch.zeros(11, 16).half()}, TypeError, "grad: dtype torch.float16 differs from x's torch.float32"),
        (
            {"into": torch.zeros(3, 8, 16, requires_grad=True)},
            ValueError,
            "into: requires a gradient, and this has none",
        ),
    ],
)
def test_what_does_not_fit(unchecked, changes, kind, message):
    p = problem(FLAT, 8, 16, torch.float32)
    args = {"into": torch.zeros(3, 8, 16), "x": p.x, "grad": p.grad, "group_sizes": p.group_sizes} | changes
    with pytest.raises(kind, match=message):
        accumulate_weight_grad(**args)
