"""What rules admit is right: every admitted placement, through real DTensors on simulated ranks.

Results and gradients have the bits of the plain operator, and not one collective is called, forward or backward.
"""

import itertools
from math import prod

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

import moesaic
from moesaic.ops import grouped_mm, sort_by_expert
from moesaic.sharding import AxisRule
from tests.sharding.problems import LINES, Problem, empty, gradients, grouped, integers, lies_as, permuting, with_grad
from tests.sharding.simulated import Ranks, no_collectives, part_of, simulated_ranks, whole

pytestmark = pytest.mark.slow

MESHES = [(2,), (4,), (2, 2)]
GROUPED = ["grouped_mm", "grouped_mm_input_grad", "grouped_mm_weight_grad"]


def check_all(problem: Problem, shape: tuple[int, ...], *, backward: bool = True) -> int:
    """Every admitted combination of placements; how many there are."""
    result, grad, grads = problem.expected()
    combinations = list(problem.combinations(shape))
    with simulated_ranks(*shape) as ranks:
        for combination in combinations:
            try:
                leaves, ours = check_result(ranks, problem, combination, result)
                if backward:
                    check_gradients(ranks, leaves, ours, grad, grads)
            except Exception as error:
                raise AssertionError(f"{problem.op}: {[axis.name for axis in combination]}") from error
    return len(combinations)


def check_result(
    ranks: Ranks, problem: Problem, combination: tuple[AxisRule, ...], expected: Tensor
) -> tuple[list[DTensor], DTensor]:
    inputs = [ranks.place(t, [axis.inputs[i] for axis in combination]) for i, t in enumerate(problem.inputs)]
    leaves = [t.requires_grad_(t.is_floating_point()) for t in inputs]
    with no_collectives():
        result = problem.function(*leaves)
    assert result.placements == tuple(axis.outputs[0] for axis in combination)
    assert torch.equal(whole(result), expected)
    return with_grad(leaves), result


def check_gradients(ranks: Ranks, leaves: list[DTensor], result: DTensor, grad: Tensor, expected: list[Tensor]) -> None:
    # What is Partial gets summed by whoever uses it, and the gradient of a sum is replicated.
    placements = [Replicate() if p.is_partial() else p for p in result.placements]
    with no_collectives():
        grads = gradients(result, leaves, ranks.place(grad, placements))
    for ours, theirs, leaf in zip(grads, expected, leaves, strict=True):
        assert torch.equal(whole(ours), theirs)
        assert lies_as(ours, leaf)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_parts_of_simulated_ranks_are_those_of_dtensor(shape):
    value = integers(5, 3, seed=0)
    with simulated_ranks(*shape) as ranks:
        for placements in itertools.product([Replicate(), Shard(0), Shard(1), Partial()], repeat=len(shape)):
            t = ranks.place(value, placements)
            assert torch.equal(whole(t), value)
            assert torch.equal(t.full_tensor().reconcile(), value)
            # Cut and summed by DTensor itself.
            replicated = t.redistribute(placements=[Replicate()] * len(shape))
            again = replicated.redistribute(placements=[Replicate() if p.is_partial() else p for p in placements])
            assert torch.equal(whole(again), value)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("form", LINES)
@pytest.mark.parametrize("op", GROUPED)
def test_grouped_mm(op, form, shape):
    # The gradients of the backward operators are made of the same three: one axis is enough for them.
    backward = op == "grouped_mm" or len(shape) == 1
    assert check_all(grouped(op, form), shape, backward=backward) == num_admitted(form, shape)


def num_admitted(form: str, shape: tuple[int, ...]) -> int:
    """Five choices an axis, and the blocks, where each rank's shard of the matrices is that of its blocks."""
    blocks = form in ("own", "shared", "fewer") or (form == "none" and shape == (4,))
    return (6 if blocks else 5) ** len(shape)


@pytest.mark.parametrize("form", LINES)
@pytest.mark.parametrize("op", GROUPED)
def test_grouped_mm_without_rows(op, form):
    check_all(empty(op, form), (4,))


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("op", ["permute", "combine"])
def test_permute_and_combine(op, weighted, shape):
    per_axis = 4 if weighted else 3
    assert check_all(permuting(op, weighted=weighted), shape) == per_axis ** len(shape)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_combine_weight_grad(shape):
    assert check_all(permuting("combine_weight_grad"), shape) == 4 ** len(shape)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_sort_by_expert(shape):
    ids = torch.tensor([[0, 2], [2, 1], [1, -1], [2, 0]])
    with simulated_ranks(*shape) as ranks, no_collectives():
        results = sort_by_expert(ranks.place(ids, [Replicate()] * len(shape)), 3, num_rows=9)
        for ours, theirs in zip(results, sort_by_expert(ids, 3, num_rows=9), strict=True):
            assert all(p.is_replicate() for p in ours.placements)
            assert torch.equal(whole(ours), theirs)


def call_on_real_ranks(form: str, shape: tuple[int, ...]) -> int:
    """As above, but every rank is a process that decides for itself."""
    mesh = init_device_mesh("cpu", shape)
    problem = grouped("grouped_mm", form)
    result, grad, grads = problem.expected()

    def place(t: Tensor, placements: list[Placement]) -> DTensor:
        part = part_of(t, placements, shape, tuple(mesh.get_coordinate()))
        stride = t.contiguous().stride()
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=t.shape, stride=stride)

    combinations = list(problem.combinations(shape))
    for combination in combinations:
        leaves = [place(t, [axis.inputs[i] for axis in combination]) for i, t in enumerate(problem.inputs)]
        leaves = [t.requires_grad_(t.is_floating_point()) for t in leaves]
        with no_collectives():
            y = problem.function(*leaves)
            placed_grad = place(grad, [Replicate() if p.is_partial() else p for p in y.placements])
            ours = torch.autograd.grad(y, with_grad(leaves), placed_grad)
        for a, b in zip((y, *ours), (result, *grads), strict=True):
            assert torch.equal(a.full_tensor(), b), [axis.name for axis in combination]
    x, w, sizes = (place(t, [Shard(0)] * len(shape)) for t in problem.inputs)
    with pytest.raises(moesaic.ShardingError):
        grouped_mm(x, w.redistribute(placements=[Shard(1)] * len(shape)), sizes)
    return len(combinations)


@pytest.mark.parametrize(
    ("form", "shape"), [("own", (2, 2)), ("none", (4,)), ("shared", (4,)), ("flat", (3,))], ids=str
)
def test_on_real_ranks(ranks, form, shape):
    assert ranks(call_on_real_ranks, prod(shape), form, shape) == [num_admitted(form, shape)] * prod(shape)
