"""grouped_mm under autograd, vmap, autocast, fake tensors, checkpointing and threads.

Legend: R rows, K and N the matrix dims, E experts, B blocks, G groups a block.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from moesaic.ops import grouped_mm
from moesaic.ops.grouped_mm import tiled
from moesaic.ops.grouped_mm.groups import as_blocks
from moesaic.ops.grouped_mm.impl import reference
from moesaic.ops.grouped_mm.impl import torch as torch_impl
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS
from moesaic.ops.implementations import Row, takes_all
from tests.ops.cpu_isa import CPU, skip_unless_supported
from tests.ops.oracle import check, exact, run
from tests.ops.strategies import FORMS, Layout, Problem, layout, problem, without_last

pytestmark = pytest.mark.slow

IMPLS = ("reference", "torch", *CPU)
LAYOUTS = {
    "flat": layout("flat", [[2, 0, 3]], slack=2),
    "own": layout("own", [[2, 0], [1, 3]], slack=1),
    "fewer": layout("own", [[2, 1], [1, 0]], slack=1, missing=1),
    "shared": layout("shared", [[2, 0], [1, 3]], slack=1),
    "empty": layout("shared", [[0, 0], [0, 0]]),
}
ops = torch.ops.moesaic


def without_poison(p: Problem) -> Problem:
    """Plain numbers everywhere: a NaN equals nothing, and has no finite difference."""
    for t in (p.x, p.w, p.grad):
        t.nan_to_num_(0.5)
    return p


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_derivatives(name, impl):
    skip_unless_supported(impl, torch.float64)  # the formulas are the same for all
    # Of each operator, so that the gradients of gradients are right to any order. Batched gradients go through vmap.
    p = without_poison(problem(LAYOUTS[name], 3, 4, torch.float64, exact=False))
    x, w, grad = (t.requires_grad_() for t in (p.x, p.w, p.grad))
    only_its_shape = torch.full_like(w, torch.nan)
    functions = {
        "grouped_mm": (lambda x, w: ops.grouped_mm(x, w, p.group_sizes, impl), (x, w)),
        "input_grad": (lambda grad, w: ops.grouped_mm_input_grad(grad, w, p.group_sizes, impl), (grad, w)),
        "weight_grad": (
            lambda x, grad: ops.grouped_mm_weight_grad(x, grad, p.group_sizes, only_its_shape, impl),
            (x, grad),
        ),
    }
    for function, inputs in functions.values():
        assert gradcheck(function, inputs, check_batched_grad=True)
        assert gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck(name, impl, dtype, monkeypatch):
    # Sizes are symbols in some of these checks, which a run-time check of `int` refuses.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    p = without_poison(problem(LAYOUTS[name], 3, 4, dtype, exact=False))
    x, w, grad = (t.requires_grad_() for t in (p.x, p.w.mT.contiguous().mT, p.grad))
    torch.library.opcheck(ops.grouped_mm, (x, w, p.group_sizes, impl))
    torch.library.opcheck(ops.grouped_mm, (x, w, p.group_sizes, impl, torch.float32))
    torch.library.opcheck(ops.grouped_mm_input_grad, (grad, w, p.group_sizes, impl))
    torch.library.opcheck(ops.grouped_mm_weight_grad, (x, grad, p.group_sizes, w, impl))


# Which dim of x, w, group_sizes and the gradient vmap takes, if any.
IN_DIMS = [
    dims for dims in itertools.product((None, 0, 1), (None, 0, -1), (None, -1), (None, 0)) if set(dims) != {None}
]


def batch_of(layout: Layout) -> list[Problem]:
    """Three problems that differ in every operand; exact, so that the order of a sum does not matter."""
    transposed = [layout.sizes, layout.sizes[::-1], tuple(block[::-1] for block in layout.sizes)]
    layouts = [replace(layout, sizes=without_last(sizes, layout.missing)) for sizes in transposed]
    return [without_poison(problem(item, 3, 4, torch.float64, seed=i)) for i, item in enumerate(layouts)]


def stack_where_batched(batch: list[Problem], in_dims: tuple[int | None, ...]) -> tuple[list, list]:
    """The operands for one vmapped call, and for a loop of plain ones."""
    vmapped, looped = [], []
    for name, dim in zip(("x", "w", "group_sizes", "grad"), in_dims, strict=True):
        values = [getattr(p, name) for p in batch]
        vmapped.append(values[0] if dim is None else torch.stack(values, dim))
        looped.append(values if dim is not None else values[:1] * len(values))
    return vmapped, list(zip(*looped, strict=True))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", ["flat", "own", "fewer", "shared"])
def test_vmap(name, in_dims):
    def all_three(x, w, sizes, grad):
        return (
            ops.grouped_mm(x, w, sizes, None),
            ops.grouped_mm_input_grad(grad, w, sizes, None),
            ops.grouped_mm_weight_grad(x, grad, sizes, w, None),
        )

    vmapped, looped = stack_where_batched(batch_of(LAYOUTS[name]), in_dims)
    expected = [torch.stack(results) for results in zip(*itertools.starmap(all_three, looped), strict=True)]
    for ours, truth in zip(torch.vmap(all_three, in_dims)(*vmapped), expected, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", ["flat", "own", "fewer", "shared"])
def test_gradients_through_vmap(name, in_dims):
    (x, w, sizes, grad), looped = stack_where_batched(batch_of(LAYOUTS[name]), in_dims)
    x, w = x.requires_grad_(), w.requires_grad_()
    y = torch.vmap(lambda x, w, sizes, grad: grouped_mm(x, w, sizes) * grad, in_dims)(x, w, sizes, grad)
    ours = torch.autograd.grad(y.sum(), (x, w))
    theirs = (
        [ops.grouped_mm_input_grad(grad, w, sizes, None) for _, w, sizes, grad in looped],
        [ops.grouped_mm_weight_grad(x, grad, sizes, w, None) for x, w, sizes, grad in looped],
    )
    for gradient, parts, dim in zip(ours, theirs, in_dims, strict=False):
        assert torch.equal(gradient, sum(parts) if dim is None else torch.stack(parts, dim))


@pytest.mark.xfail(raises=RuntimeError, reason="pytorch/pytorch#168393: no torch.func.grad of torch.library operators")
def test_func_grad():
    p = problem(LAYOUTS["flat"], 3, 4, torch.float64)
    torch.func.grad(lambda x: grouped_mm(x, p.w, p.group_sizes).sum())(p.x)


def test_vmap_of_rows_without_expert():
    p = batch_of(LAYOUTS["fewer"])[0]
    sizes = torch.stack([p.group_sizes, p.group_sizes + torch.tensor([[0, 0], [0, 1]])])
    with pytest.raises(ValueError, match="group 1 of block 1 has 1 rows but no expert"):
        torch.vmap(grouped_mm, (None, None, 0))(p.x, p.w, sizes)


def test_nested_vmap():
    # Rows in the inner batch, weights in the outer: blocks of blocks, their experts shared and then not.
    p, q = batch_of(LAYOUTS["shared"])[:2]
    x, w = torch.stack([p.x, q.x, -p.x]), torch.stack([p.w, q.w])
    function = torch.vmap(torch.vmap(grouped_mm, (0, None, None)), (None, 0, None))
    expected = torch.stack([torch.stack([grouped_mm(a, b, p.group_sizes) for a in x]) for b in w])
    assert torch.equal(function(x, w, p.group_sizes), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl, dtype):
    skip_unless_supported(impl, dtype)
    p = problem(LAYOUTS["shared"], 9, 5, torch.float32, exact=False)
    x, w = p.x.requires_grad_(), p.w.requires_grad_()
    cast = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
    expected = grouped_mm(*cast, p.group_sizes, impl=impl)
    with torch.autocast("cpu", dtype):
        y = grouped_mm(x, w, p.group_sizes, impl=impl)
        wide = grouped_mm(x, w, p.group_sizes, impl=impl, out_dtype=torch.float32)
        mixed = grouped_mm(x.detach().to(dtype), w, p.group_sizes, impl=impl)
        with torch.autocast("cpu", enabled=False):
            off = grouped_mm(x, w, p.group_sizes, impl=impl)
    assert (y.dtype, wide.dtype, mixed.dtype, off.dtype) == (dtype, torch.float32, dtype, torch.float32)
    assert torch.equal(y, expected)
    assert torch.equal(mixed, expected)
    assert torch.equal(wide, grouped_mm(*cast, p.group_sizes, impl=impl, out_dtype=torch.float32))
    assert torch.equal(off, grouped_mm(x, w, p.group_sizes, impl=impl))
    grad = p.grad.to(dtype)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, w), grad), torch.autograd.grad(expected, cast, grad), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("module", [reference, torch_impl, tiled])
def test_autocast_does_not_reach_into_the_operators(module, monkeypatch):
    # Products in fp32 inside an operator would become products in bf16.
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", Row(module, takes_all))
    p = problem(layout("shared", [[40, 30], [0, 70]], slack=1), 60, 20, torch.bfloat16, exact=False)
    with torch.autocast("cpu", torch.bfloat16):
        results = run("torch", p, torch.float32)
    check(p, results, out_dtype=torch.float32, margin=1.5)


def test_autocast_leaves_fp64_alone():
    p = problem(LAYOUTS["own"], 3, 4, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        check(p, run("torch", p))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_fake_and_meta_tensors(form, impl):
    p = problem(LAYOUTS[form], 3, 4, torch.bfloat16, strides=("sliced", "transposed", "expanded"))
    for out_dtype in (None, torch.float32):
        real = run(impl, p, out_dtype)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = run(impl, on_fake_tensors(p, mode), out_dtype)
        meta = run(impl, Problem(*(t.to("meta") for t in (p.x, p.w, p.group_sizes, p.grad)), [], False), out_dtype)
        for a, b, c in zip(real, fake, meta, strict=True):
            assert a.shape == b.shape == c.shape
            assert a.dtype == b.dtype == c.dtype
            assert a.stride() == b.stride() == c.stride()


def on_fake_tensors(p: Problem, mode: FakeTensorMode) -> Problem:
    return Problem(*map(mode.from_tensor, (p.x, p.w, p.group_sizes, p.grad)), p.experts, p.exact)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_never_read_group_sizes_to_the_host(name):
    # A fake tensor has no values: reading one raises.
    p = problem(LAYOUTS[name], 3, 4, torch.bfloat16)
    with FakeTensorMode() as mode:
        run("tiled", on_fake_tensors(p, mode))


def test_reading_group_sizes_to_the_host_would_be_seen():
    p = problem(LAYOUTS["flat"], 3, 4, torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = on_fake_tensors(p, mode)
        with pytest.raises(DataDependentOutputException):
            torch_impl.forward(fake.x, fake.w, as_blocks(fake.group_sizes), fake.x.dtype)


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 5000])
@pytest.mark.parametrize("form", FORMS)
def test_tiles_a_few_at_a_time(form, chunk_bytes, monkeypatch):
    monkeypatch.setattr(tiled, "_CHUNK_BYTES", chunk_bytes)
    p = problem(layout(form, [[70, 0, 129], [1, 64, 0]], slack=5), 9, 7, torch.float32)
    check(p, run("tiled", p))


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpointed_gradients_have_the_same_bits(impl):
    p = problem(LAYOUTS["shared"], 8, 8, torch.float32, exact=False)
    x, w = p.x.requires_grad_(), p.w.requires_grad_()

    def twice(x, w):
        return grouped_mm(grouped_mm(x, w, p.group_sizes, impl=impl).sin(), w, p.group_sizes, impl=impl)

    plain = torch.autograd.grad(twice(x, w), (x, w), p.grad)
    again = torch.autograd.grad(checkpoint(twice, x, w, use_reentrant=False), (x, w), p.grad)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_calls_from_many_threads(impl):
    p = problem(layout("shared", [[9, 0, 30], [3, 3, 3]], slack=1), 16, 8, torch.float32)
    truth = exact(p)

    def call(_):
        return run(impl, p)

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(call, range(64)):
            for ours, true in zip(results, truth, strict=True):
                assert torch.equal(ours.double(), true)
