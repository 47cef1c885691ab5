"""What rules do not admit raises, and the error says how to get where they do: its advice is followed here."""

import contextlib
import functools
import itertools
import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import moesaic
from moesaic.ops import grouped_mm, sort_by_expert
from moesaic.sharding.rule import short
from tests.sharding.problems import Problem, grouped, integers, permuting
from tests.sharding.simulated import Ranks, no_collectives, simulated_ranks, whole

pytestmark = pytest.mark.slow

FORMS = ["flat", "own", "shared"]
GROUPED = ["grouped_mm", "grouped_mm_input_grad", "grouped_mm_weight_grad"]
NAMES = {
    "grouped_mm": ["x", "w", "group_sizes"],
    "grouped_mm_input_grad": ["grad", "w", "group_sizes"],
    "grouped_mm_weight_grad": ["x", "grad", "group_sizes", "w"],
    "permute": ["x", "slots", "positions", "weights"],
    "combine": ["y", "slots", "positions", "weights"],
}
# Gradients arrive as autograd likes: they may be brought to where they are wanted.
MOVABLE = "grad"
# Of a weight to be differentiated by only the shape is read: Partial is as good as replicated.
SHAPE_ONLY = {"grouped_mm_weight_grad": "w"}


def placements_of(t: Tensor) -> list:
    """Every placement on one axis."""
    return [Replicate(), *map(Shard, range(t.ndim)), Partial()]


def follow(message: str, inputs: dict[str, DTensor]) -> dict[str, DTensor]:
    """Run the lines of code in an error message."""
    lines = [line for line in message.splitlines() if re.match(r"  \w+ = \w+\.redistribute\(", line)]
    assert lines, message
    names = inputs | {"Replicate": Replicate, "Shard": Shard, "Partial": Partial}
    exec("\n".join(line.strip() for line in lines), names)
    return {name: names[name] for name in inputs}


def check_right_or_refused(problem: Problem, inputs: dict[str, DTensor], *, moves: bool = False) -> bool:
    """Whether the call was admitted. Refused, it has to be admitted once the message was followed."""
    expected = problem.function(*problem.inputs)
    try:
        with contextlib.nullcontext() if moves else no_collectives():
            result = problem.function(*inputs.values())
        message = ""
    except moesaic.ShardingError as error:
        message = str(error)
    if not message:
        assert torch.equal(whole(result), expected)
        return True
    assert message.startswith(f"moesaic::{problem.op.__name__}: no sharding rule admits {show(inputs)} on the mesh (")
    fixed = follow(message, inputs)
    assert f"Nearest admitted: {show(fixed)}. To get there:" in message
    with no_collectives():
        result = problem.function(*fixed.values())
    assert torch.equal(whole(result), expected)
    return False


def show(inputs: dict[str, DTensor]) -> str:
    return ", ".join(f"{name} [{', '.join(map(short, t.placements))}]" for name, t in inputs.items())


def placer(ranks: Ranks, problem: Problem, op: str) -> Callable[..., dict[str, DTensor]]:
    """Places the inputs; ``placements`` has a tuple for each, with a placement for each axis."""
    place = functools.cache(lambda i, placements: ranks.place(problem.inputs[i], placements))
    return lambda placements: {name: place(i, p) for i, (name, p) in enumerate(zip(NAMES[op], placements, strict=True))}


# Of the weight gradient, which takes four tensors, one form stands for the others.
ALL_PLACEMENTS = [
    pytest.param(op, form, marks=[pytest.mark.long] if op.endswith("weight_grad") and form != "shared" else [])
    for op in GROUPED
    for form in FORMS
]


@pytest.mark.parametrize(("op", "form"), ALL_PLACEMENTS)
def test_every_placement_on_one_axis(op, form):
    problem = grouped(op, form)
    admitted = {axis.inputs for axis in problem.choices()}

    def is_movable(placements) -> bool:
        triples = [list(zip(NAMES[op], placements, wanted, strict=True)) for wanted in admitted]
        return any(all(p == w or (n == MOVABLE and not w.is_partial()) for n, p, w in triple) for triple in triples)

    with simulated_ranks(2) as ranks:
        place = placer(ranks, problem, op)
        for placements in itertools.product(*map(placements_of, problem.inputs)):
            effective = tuple(
                Replicate() if name == SHAPE_ONLY.get(op) and p.is_partial() else p
                for name, p in zip(NAMES[op], placements, strict=True)
            )
            moves = effective not in admitted and is_movable(effective)
            result = check_right_or_refused(problem, place([(p,) for p in placements]), moves=moves)
            assert result == (effective in admitted or moves), placements


@pytest.mark.parametrize("op", ["permute", "combine"])
def test_every_placement_of_permute_and_combine(op):
    problem = permuting(op)
    admitted = {axis.inputs for axis in problem.choices()}
    kinds = [placements_of(t)[: None if t.is_floating_point() else -1] for t in problem.inputs]
    with simulated_ranks(2) as ranks:
        place = placer(ranks, problem, op)
        for placements in itertools.product(*kinds):
            result = check_right_or_refused(problem, place([(p,) for p in placements]))
            assert result == (placements in admitted), placements


@pytest.mark.parametrize("form", FORMS)
def test_placements_on_two_axes(form):
    problem = grouped("grouped_mm", form)
    admitted = {axis.inputs for axis in problem.choices()}
    draws = random.Random(form)
    with simulated_ranks(2, 2) as ranks:
        place = placer(ranks, problem, "grouped_mm")
        for _ in range(30):
            # One axis as it should be, or nearly; the other any.
            axes = [
                list(draws.choice(sorted(admitted, key=str))),
                [draws.choice(placements_of(t)) for t in problem.inputs],
            ]
            if draws.random() < 0.5:
                i = draws.randrange(3)
                axes[0][i] = draws.choice(placements_of(problem.inputs[i]))
            draws.shuffle(axes)
            result = check_right_or_refused(problem, place(list(zip(*axes, strict=True))))
            assert result == all(tuple(axis) in admitted for axis in axes)


def test_the_message():
    x, w, sizes = grouped("grouped_mm", "own").inputs
    with simulated_ranks(2, 2) as ranks:
        x = ranks.place(x, [Shard(0), Replicate()])
        w = ranks.place(w, [Shard(0), Shard(2)])
        sizes = ranks.place(sizes, [Replicate(), Replicate()])
        with pytest.raises(moesaic.ShardingError) as caught:
            grouped_mm(x, w, sizes)
    assert str(caught.value) == "\n".join(
        [
            "moesaic::grouped_mm: no sharding rule admits x [S(0), R], w [S(0), S(2)], group_sizes [R, R] "
            "on the mesh (a=2, b=2).",
            "The rule is '(b c) k, (b g)? k n, b g -> (b c) n'; 'b' has 4 blocks, which are cut between blocks only.",
            "Nearest admitted: x [S(0), R], w [S(0), S(2)], group_sizes [S(0), R]. To get there:",
            "  group_sizes = group_sizes.redistribute(placements=[Shard(0), Replicate()])",
            "Nothing is redistributed silently; sharding_rule(..., redistribute=['group_sizes']) allows it.",
        ]
    )


@pytest.mark.parametrize(("blocks", "shape"), [(3, (2,)), (2, (4,)), (2, (2, 2)), (6, (2, 2))])
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_that_do_not_divide(shared, blocks, shape):
    x, sizes = integers(blocks * 2, 3, seed=1), torch.tensor([[1, 1]] * blocks)
    w = integers(2 if shared else 2 * blocks, 3, 5, seed=2)
    inputs = {"x": x, "w": w, "group_sizes": sizes}
    everywhere = [Shard(0)] * len(shape)
    with simulated_ranks(*shape) as ranks:
        placed = {
            name: ranks.place(t, [Replicate()] * len(shape) if shared and name == "w" else everywhere)
            for name, t in inputs.items()
        }
        with pytest.raises(moesaic.ShardingError, match=f"'b' has {blocks} blocks, which are cut between") as caught:
            grouped_mm(**placed)
        result = grouped_mm(**follow(str(caught.value), placed))
        assert torch.equal(whole(result), grouped_mm(**inputs))


def test_partial_of_another_reduction():
    x, w, sizes = grouped("grouped_mm", "flat").inputs
    with simulated_ranks(2) as ranks:
        w, sizes = ranks.place(w, [Replicate()]), ranks.place(sizes, [Replicate()])
        x_max = DTensor.from_local(x, ranks.mesh, [Partial("max")])
        with pytest.raises(moesaic.ShardingError, match=r"x \[P\(max\)\]") as caught:
            grouped_mm(x_max, w, sizes)
        fixed = follow(str(caught.value), {"x": x_max, "w": w, "group_sizes": sizes})
        assert torch.equal(whole(grouped_mm(**fixed)), grouped_mm(*grouped("grouped_mm", "flat").inputs))


def test_gradients_are_brought_to_where_they_are_wanted():
    # What is Partial is often reduced to a shard by whoever uses it, and its gradient is one then.
    problem = grouped("grouped_mm", "flat")
    _, grad, expected = problem.expected()
    with simulated_ranks(2) as ranks:
        for placement in (Shard(0), Shard(1), Partial(), Replicate()):
            x, w, sizes = (ranks.place(t, [Replicate()]) for t in problem.inputs)
            y = grouped_mm(x.requires_grad_(), w.requires_grad_(), sizes)
            grads = torch.autograd.grad(y, (x, w), ranks.place(grad, [placement]))
            assert all(torch.equal(whole(ours), theirs) for ours, theirs in zip(grads, expected, strict=True))


def test_indices_stay_whole():
    with simulated_ranks(2) as ranks:
        ids = ranks.place(torch.tensor([[0, 1], [1, 0]]), [Shard(0)])
        with pytest.raises(moesaic.ShardingError, match=r"ids = ids.redistribute\(placements=\[Replicate\(\)\]\)"):
            sort_by_expert(ids, 2)
