"""What a right result is: an fp64 oracle, the naive loop, and the rule that compares a result with both.

The rule: the largest error may be ``MARGINS`` times that of the naive loop over groups, which works in the same dtype
and accumulates half types in fp32. No tolerance is picked by hand. Where the naive loop happens to be nearly exact (few
elements, short sums) its error is luck; one rounding of the accumulation type, of the sum of the terms' magnitudes,
stands in for it.

Legend: R rows, K and N the matrix dims, W weight matrices.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops import grouped_mm
from moesaic.ops.grouped_mm import tiled
from moesaic.ops.grouped_mm.groups import as_blocks
from tests.ops.strategies import Problem

HALF = (torch.bfloat16, torch.float16)
# A half type's error is its one rounding at the end. In fp32 it is the order of the sum, and with few elements luck.
MARGINS = {torch.bfloat16: 1.25, torch.float16: 1.25, torch.float32: 4.0}


class Results(NamedTuple):
    """The product, and the gradients of ``x`` and ``w``."""

    y: Tensor
    gx: Tensor
    gw: Tensor


def run(impl: str | None, p: Problem, out_dtype: torch.dtype | None = None) -> Results:
    """The three results by an implementation of the public function, or by the ``tiled`` functions themselves."""
    if impl == "tiled":
        sizes = as_blocks(p.group_sizes)
        return Results(
            tiled.forward(p.x, p.w, sizes, out_dtype or p.x.dtype),
            tiled.forward(p.grad, p.w.mT, sizes, p.grad.dtype),
            tiled.weight_grad(p.x, p.grad, sizes, p.w.shape[0]),
        )
    x, w = p.x.detach().requires_grad_(), p.w.detach().requires_grad_()
    y = grouped_mm(x, w, p.group_sizes, impl=impl, out_dtype=out_dtype)
    return Results(y.detach(), *torch.autograd.grad(y, (x, w), p.grad.to(y.dtype)))


def run_operators(impl: str | None, p: Problem) -> Results:
    """The three results by the operators, which check no shapes."""
    ops = torch.ops.moesaic
    return Results(
        ops.grouped_mm(p.x, p.w, p.group_sizes, impl),
        ops.grouped_mm_input_grad(p.grad, p.w, p.group_sizes, impl),
        ops.grouped_mm_weight_grad(p.x, p.grad, p.group_sizes, p.w, impl),
    )


def exact(p: Problem) -> Results:
    """The results in fp64, row by row."""
    rows = torch.tensor([r for r, e in enumerate(p.experts) if e >= 0], dtype=torch.int64)
    experts = torch.tensor([e for e in p.experts if e >= 0], dtype=torch.int64)
    x, w, grad = (t.cpu().double() for t in (p.x, p.w, p.grad))
    y, gx = grad.new_zeros(grad.shape), x.new_zeros(x.shape)
    y[rows] = torch.einsum("rk,rkn->rn", x[rows], w[experts])
    gx[rows] = torch.einsum("rn,rkn->rk", grad[rows], w[experts])
    terms = torch.einsum("rk,rn->rkn", x[rows], grad[rows])
    return Results(y, gx, w.new_zeros(w.shape).index_add_(0, experts, terms))


def magnitude(p: Problem) -> Results:
    """What the results would be if no term could cancel another."""
    return exact(replace(p, x=p.x.abs(), w=p.w.abs(), grad=p.grad.abs()))


def naive(p: Problem, out_dtype: torch.dtype | None = None) -> Results:
    """The results by a loop over groups, in the problem's dtype, with fp32 accumulation."""
    acc = torch.float32 if p.x.dtype in HALF else p.x.dtype
    x, w, grad = (t.cpu().to(acc) for t in (p.x, p.w, p.grad))
    y, gx, gw = grad.new_zeros(grad.shape), x.new_zeros(x.shape), w.new_zeros(w.shape)
    for e in sorted(set(p.experts) - {-1}):
        rows = [r for r, expert in enumerate(p.experts) if expert == e]
        y[rows] = x[rows] @ w[e]
        gx[rows] = grad[rows] @ w[e].mT
        gw[e] = x[rows].mT @ grad[rows]
    return Results(y.to(out_dtype or p.x.dtype), gx.to(p.x.dtype), gw.to(p.x.dtype))


def check(p: Problem, results: Results, *, out_dtype: torch.dtype | None = None, margin: float | None = None) -> None:
    """Assert that results are right: bit for bit where the problem is exact, by the rule otherwise."""
    truths = exact(p)
    if p.exact:
        for name, ours, truth in zip(Results._fields, results, truths, strict=True):
            assert ours.dtype == (out_dtype if out_dtype and name == "y" else p.x.dtype), name
            assert torch.equal(ours.cpu(), truth.to(ours.dtype)), name
        return
    padding = torch.tensor([e < 0 for e in p.experts], dtype=torch.bool)
    assert not results.y.cpu()[padding].any(), "padding rows of y"
    assert not results.gx.cpu()[padding].any(), "padding rows of gx"
    for name, *values in zip(Results._fields, results, naive(p, out_dtype), truths, magnitude(p), strict=True):
        assert_accurate(*values, name=name, margin=margin)


def assert_accurate(
    ours: Tensor,
    naive: Tensor,
    truth: Tensor,
    magnitude: Tensor,
    *,
    name: str = "",
    margin: float | None = None,
) -> None:
    """The rule, for one result; ``magnitude`` is the sum of the magnitudes of the terms of each element."""
    assert ours.dtype == naive.dtype, name
    assert ours.shape == truth.shape, name
    if not truth.numel():
        return
    rounding = torch.finfo(torch.float32 if ours.dtype in HALF else ours.dtype).eps / 2
    allowed = max(largest(naive.double() - truth), rounding * largest(magnitude))
    error = largest(ours.cpu().double() - truth)
    margin = margin or MARGINS[ours.dtype]
    assert error <= margin * allowed, f"{name}: error {error:g}, the naive loop's is {allowed:g}"


def largest(t: Tensor) -> float:
    return float(t.abs().max())


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` and its like return, so that reading it cannot pass unseen."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
