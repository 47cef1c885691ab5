"""The permutation operators under autograd, fake tensors, autocast and vmap, and what they refuse.

Legend: T tokens, K copies a token, R rows, D model dim.
"""

import jaxtyping
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from moesaic.ops import combine, permute, sort_by_expert
from tests.ops.permute_oracle import problem, run

ops = torch.ops.moesaic

ROUTING = torch.tensor([[2, 0], [0, 9], [-1, 3], [2, 2], [-1, -1]])


@pytest.mark.parametrize("weighted", [True, False])
def test_derivatives(weighted):
    # Of each operator, so that the gradients of gradients are right to any order.
    permutation = sort_by_expert(ROUTING, 4, num_rows=8)
    slots, positions, _ = permutation
    p = problem(permutation, 3, torch.float64, weighted=weighted, exact=False)
    x, y = (t.nan_to_num(0.5).requires_grad_() for t in (p.x, p.y))
    weights = (p.weights.requires_grad_(),) if weighted else ()
    functions = {
        "permute": (lambda x, *w: permute(x, permutation, *w), (x, *weights)),
        "combine": (lambda y, *w: combine(y, permutation, *w), (y, *weights)),
        "weight_grad": (lambda y, x: ops.combine_weight_grad(y, x, slots, positions), (y, x)),
    }
    for function, inputs in functions.values():
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 0])
def test_opcheck(tokens, dtype, monkeypatch):
    # Sizes are symbols in some of these checks, which a run-time check of `int` refuses.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids = ROUTING[:tokens]
    permutation = sort_by_expert(ids, 4, num_rows=8)
    slots, positions, _ = permutation
    p = problem(permutation, 3, dtype, weights_dtype=torch.float32)
    x, y, weights = (t.nan_to_num(0).requires_grad_() for t in (p.x, p.y, p.weights))
    torch.library.opcheck(ops.sort_by_expert, (ids, 4, 8))
    for maybe_weights in ((weights,), ()):
        torch.library.opcheck(ops.permute, (x, slots, positions, *maybe_weights))
        torch.library.opcheck(ops.combine, (y, slots, positions, *maybe_weights))
    torch.library.opcheck(ops.combine_weight_grad, (y, x, slots, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_and_meta_tensors(dtype):
    def everything(ids, x, y, weights):
        permutation = sort_by_expert(ids, 4, num_rows=8)
        gw = ops.combine_weight_grad(y, x, permutation.slots, permutation.positions)
        return (*permutation, permute(x, permutation, weights), combine(y, permutation, weights), gw)

    operands = (ROUTING.int(), torch.ones(5, 6, dtype=dtype)[:, ::2], torch.ones(8, 3, dtype=dtype), torch.ones(5, 2))
    real = everything(*operands)
    meta = everything(*(t.to("meta") for t in operands))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = everything(*map(mode.from_tensor, operands))
    for a, b, c in zip(real, fake, meta, strict=True):
        assert a.shape == b.shape == c.shape
        assert a.dtype == b.dtype == c.dtype
        assert a.stride() == b.stride() == c.stride()


def test_autocast_changes_nothing():
    p = problem(sort_by_expert(ROUTING, 4, num_rows=8), 300, torch.float32, exact=False)
    plain = run(p)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(p)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_vmap():
    permutation = sort_by_expert(ROUTING, 4, num_rows=8)
    x, weights = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    there = torch.vmap(lambda x: permute(x, permutation))(x)
    assert torch.equal(there, torch.stack([permute(item, permutation) for item in x]))
    back = torch.vmap(lambda y, weights: combine(y, permutation, weights))(there, weights)
    expected = [combine(y, permutation, w) for y, w in zip(there, weights, strict=True)]
    assert torch.equal(back, torch.stack(expected))


IDS, ROWS = torch.tensor([[0, 1], [1, 0], [2, 2]]), torch.ones(3, 4)
HERE = sort_by_expert(IDS, 3)
ERRORS = {
    "ids of 1 dim": (ValueError, lambda: sort_by_expert(IDS[0], 3), r"ids: expected \[T, K\], got \[2\]"),
    "float ids": (TypeError, lambda: sort_by_expert(IDS.float(), 3), r"ids: dtype torch.float32 .* integer type"),
    "bool ids": (TypeError, lambda: sort_by_expert(IDS.bool(), 3), r"ids: dtype torch.bool is not supported"),
    "no experts": (ValueError, lambda: sort_by_expert(IDS, 0), r"num_experts: must be at least 1, got 0"),
    "too few rows": (
        ValueError,
        lambda: sort_by_expert(IDS, 3, num_rows=5),
        r"num_rows: 5 rows cannot hold the 6 routed token copies",
    ),
    "negative rows": (ValueError, lambda: sort_by_expert(IDS, 3, num_rows=-1), r"num_rows: must be at least 0, got -1"),
    "x of another length": (
        ValueError,
        lambda: permute(ROWS[:2], HERE),
        r"x: expected \[3, D\] for this permutation, got \[2, 4\]",
    ),
    "x of 3 dims": (ValueError, lambda: permute(ROWS.view(3, 2, 2), HERE), r"x: expected \[3, D\] .* got \[3, 2, 2\]"),
    "y of another length": (
        ValueError,
        lambda: combine(ROWS, HERE),
        r"y: expected \[6, D\] for this permutation, got \[3, 4\]",
    ),
    "weights by row": (
        ValueError,
        lambda: permute(ROWS, HERE, torch.ones(6)),
        r"weights: expected \[3, 2\], got \[6\]",
    ),
    "weights transposed": (
        ValueError,
        lambda: combine(torch.ones(6, 4), HERE, torch.ones(2, 3)),
        r"weights: expected \[3, 2\], got \[2, 3\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    error, call, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
