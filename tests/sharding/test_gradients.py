"""Gradients as autograd really brings them: of a sum, which is replicated whatever the result is, and of gradients."""

import contextlib
from collections.abc import Sequence

import pytest
import torch
from torch.distributed.tensor import Placement, Replicate

from tests.sharding.problems import LINES, Problem, grouped, integers, lies_as, permuting, with_grad
from tests.sharding.simulated import no_collectives, simulated_ranks, whole

PROBLEMS: dict[str, Problem] = {
    **{f"grouped_mm, {form}": grouped("grouped_mm", form) for form in LINES},
    **{op: permuting(op) for op in ("permute", "combine")},
}


def summed(placements: Sequence[Placement]) -> list[Placement]:
    """Where the gradient of a result lies: what is Partial gets summed by whoever uses it."""
    return [Replicate() if p.is_partial() else p for p in placements]


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_of_a_sum(name, shape):
    problem = PROBLEMS[name]
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in problem.inputs]
    expected = torch.autograd.grad(problem.function(*leaves).sum(), with_grad(leaves))
    with simulated_ranks(*shape) as ranks:
        for combination in problem.combinations(shape):
            if len(shape) == 2 and combination[0].factor is None:
                continue  # as on one axis
            placed = [ranks.place(t, [a.inputs[i] for a in combination]) for i, t in enumerate(problem.inputs)]
            leaves = [t.requires_grad_(t.is_floating_point()) for t in placed]
            with no_collectives():
                grads = torch.autograd.grad(problem.function(*leaves).sum(), with_grad(leaves))
            for ours, theirs, leaf in zip(grads, expected, with_grad(leaves), strict=True):
                assert torch.equal(whole(ours), theirs), [axis.name for axis in combination]
                if problem.op is torch.ops.moesaic.grouped_mm:
                    # Replicated as it arrives, it must not give a weight that is sharded by columns a whole gradient.
                    assert lies_as(ours, leaf), [axis.name for axis in combination]


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_gradients(name):
    problem = PROBLEMS[name]
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in problem.inputs]
    result = problem.function(*leaves)
    grad = integers(*result.shape, seed=9).requires_grad_()
    first = torch.autograd.grad(result, with_grad(leaves), grad, create_graph=True)
    ups = [integers(*g.shape, seed=seed) for seed, g in enumerate(first)]
    expected = torch.autograd.grad(first, [*with_grad(leaves), grad], ups)
    with simulated_ranks(2) as ranks:
        for combination in problem.combinations((2,)):
            placed = [ranks.place(t, [a.inputs[i] for a in combination]) for i, t in enumerate(problem.inputs)]
            leaves = [t.requires_grad_(t.is_floating_point()) for t in placed]
            # torch 2.11 adds up gradients that are Partial with a collective of its own.
            with no_collectives() if torch.__version__ >= (2, 12) else contextlib.nullcontext():
                result = problem.function(*leaves)
                placed_grad = ranks.place(grad.detach(), summed(result.placements)).requires_grad_()
                first = torch.autograd.grad(result, with_grad(leaves), placed_grad, create_graph=True)
                placed_ups = [ranks.place(up, summed(g.placements)) for up, g in zip(ups, first, strict=True)]
                second = torch.autograd.grad(first, [*with_grad(leaves), placed_grad], placed_ups)
            for ours, theirs in zip(second, expected, strict=True):
                assert torch.equal(whole(ours), theirs), [axis.name for axis in combination]
