"""A parallelized MoE equals the one-process MoE, on every layout and on routings that leave experts and ranks idle."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import moesaic
from moesaic.layers import update_expert_bias
from moesaic.testing import Layout
from tests.distributed.parity import LocalAdamW, clip, legal_layouts, meshes_of

DIM, BATCH, STEPS = 16, 8, 3

# Where the optimizer steps on DTensors, as users' do. Elsewhere on local shards: DTensor propagates placements for each
# elementwise operation of AdamW, which took most of the time.
ON_DTENSORS = [{"tp": 2, "dp_replicate": 1, "ep": 2, "etp": 2}, {"tp": 2, "dp_replicate": 2, "ep": 8, "etp": 1}]


class Sizes(NamedTuple):
    experts: int
    hidden: int
    biases: bool = True
    gated: bool = True


EVEN = Sizes(experts=8, hidden=12)

# The routing of each step, made by biases on the scores: experts that are never chosen, or always. Counted round and
# round where there are fewer.
ROUTINGS: dict[str, list[dict[int, float]]] = {
    "ordinary, idle experts, idle ranks": [{}, {1: -9.0, 2: -9.0, 6: -9.0}, dict.fromkeys(range(4), -9.0)],
    "everything on one expert": [{5: 9.0}, {0: 9.0}, {7: 9.0}],
}


WAYS = ("dtensor", "local")
ALL_RUNS = tuple(itertools.product(WAYS, ROUTINGS))


def mask_of(step: int, length: int) -> Tensor | None:
    """Padding in one of the steps: left, right, and whole sequences, so that whole ranks have nothing else."""
    first, last = torch.tensor([[0, length], [0, 1], [2, length], [0, length - 1], [0, 0], [3, 5], [0, 0], [1, 3]]).mT
    position = torch.arange(length)
    return (position >= first.unsqueeze(1)) & (position < last.unsqueeze(1)) if step == 1 else None


def make_moe(routing: str, sizes: Sizes) -> moesaic.MoE:
    torch.manual_seed(0)
    only_one = routing == "everything on one expert"
    config = moesaic.MoEConfig(
        dim=DIM,
        hidden_dim=sizes.hidden,
        num_experts=sizes.experts,
        top_k=1 if only_one else 3,
        # The weight of a token's only expert would be 1, and the router's gradient nothing but rounding errors.
        normalize_top_k=not only_one,
        activation="silu" if sizes.gated else "relu2",
        gated=sizes.gated,
        score="sigmoid",
        aux_loss_coef=0.1,
        aux_loss="sequence" if only_one else "batch",
        z_loss_coef=0.01,
        bias_update_speed=0.01,
        shared_hidden_dim=10,
        shared_gate=True,
        logit_bias=not only_one,
        expert_biases=sizes.biases and not only_one,
        weigh_inputs=only_one,
    )
    moe = moesaic.MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


class Run(NamedTuple):
    """One way of computing with one routing; its methods are the functions of a check."""

    routing: str
    way: str
    length: int
    sizes: Sizes

    def inputs(self, rank: int, layout: Layout) -> list[dict[str, object]]:
        generator = torch.Generator().manual_seed(1)
        meshes = meshes_of(layout)
        rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
        mine = (rows, meshes.sequence_positions(self.length))
        batches = []
        for step in range(STEPS):
            x, target = torch.randn(2, BATCH, self.length, DIM, generator=generator)
            mask = mask_of(step, self.length)
            batches.append({"x": x[mine], "target": target[mine], "mask": None if mask is None else mask[mine]})
            batches[-1]["routing"] = ROUTINGS[self.routing][step]
        return batches

    def loss(self, moe: moesaic.MoE, batch: dict[str, object]) -> Tensor:
        moe.router.bias.zero_()
        for expert, bias in batch["routing"].items():
            moe.router.bias[expert % len(moe.router.bias)] = bias
        with moesaic.balance_losses() as losses:
            y = moe(batch["x"], batch["mask"])
        return (y - batch["target"]).square().sum() / (BATCH * self.length) + sum(losses)

    def parallelize(self, moe: moesaic.MoE, layout: Layout) -> nn.Module:
        return moesaic.parallelize(moe, meshes_of(layout), compute=self.way)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


def check_layout(
    equal_gradients,
    world_size: int,
    layout: dict[str, int],
    length: int,
    sizes: Sizes,
    runs: Sequence[tuple[str, str]] | None = None,
    on_dtensors: bool = False,
) -> None:
    for way, routing in runs or some_runs(world_size, layout):
        run = Run(routing, way, length, sizes)
        equal_gradients(
            functools.partial(make_moe, routing, sizes),
            run.inputs,
            run.parallelize,
            [layout],
            world=world_size,
            loss=run.loss,
            clip=clip,
            optimizer=adamw if on_dtensors else functools.partial(LocalAdamW, lr=1e-2),
            after_step=update_expert_bias,
            steps=STEPS,
        )


LAYOUTS = [(n, layout) for n in (1, 2, 4, 8) for layout in legal_layouts(n)]
assert all(layout in legal_layouts(8) for layout in ON_DTENSORS)


def some_runs(world_size: int, layout: dict[str, int]) -> Sequence[tuple[str, str]]:
    """On 4 ranks each way with one routing and each routing with one way, on 8 one pair, which take turns.

    The long tests have all pairs.
    """
    if world_size < 4:
        return ALL_RUNS
    turn = legal_layouts(world_size).index(layout) if layout in legal_layouts(world_size) else 0
    if world_size < 8:
        return [ALL_RUNS[turn % 2], ALL_RUNS[3 - turn % 2]]
    return [ALL_RUNS[turn % len(ALL_RUNS)]]


def name_of(value: int | dict[str, int]) -> str:
    return str(value) if isinstance(value, int) else " ".join(f"{k}{v}" for k, v in value.items())


# Of the layouts on 8 ranks CI tries every third, with each pair of way and routing; the long tests have all.
IN_CI = [case for case in LAYOUTS if case[0] < 8] + [case for case in LAYOUTS if case[0] == 8][::3]


# A length that no tp divides.
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [pytest.param(*case, marks=[] if case in IN_CI else [pytest.mark.long]) for case in LAYOUTS],
    ids=name_of,
)
def test_every_layout(equal_gradients, world_size, layout):
    check_layout(equal_gradients, world_size, layout, 5, EVEN, on_dtensors=layout in ON_DTENSORS)


@pytest.mark.long
@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=name_of)
def test_every_layout_with_steps_on_dtensors(equal_gradients, world_size, layout):
    check_layout(equal_gradients, world_size, layout, 5, EVEN, ALL_RUNS, on_dtensors=True)


# Lengths that 2 cp do not divide, and one with which ranks have nothing.
CONTEXT = [
    (2, {"cp": 2, "ep": 2}, 5),
    (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}, 5),
    (4, {"cp": 4, "ep": 2}, 7),
    (4, {"cp": 2, "dp_replicate": 2, "ep": 4}, 3),
    (8, {"cp": 2, "tp": 2, "dp_replicate": 2, "ep": 2, "etp": 2}, 5),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout", "length"),
    [pytest.param(*case, marks=[pytest.mark.long] if case[0] > 4 else []) for case in CONTEXT],
    ids=name_of,
)
def test_ranks_of_cp_hold_other_tokens(equal_gradients, world_size, layout, length):
    check_layout(equal_gradients, world_size, layout, length, EVEN, on_dtensors=world_size == 2)


# A length shorter than tp.
@pytest.mark.parametrize("layout", [{"tp": 4, "ep": 2, "etp": 2}, {"tp": 4, "ep": 4}, {"tp": 2, "etp": 4}], ids=name_of)
def test_ranks_without_a_token(equal_gradients, layout):
    check_layout(equal_gradients, 4, layout, 1, EVEN)
