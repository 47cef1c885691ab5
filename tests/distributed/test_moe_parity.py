"""A parallelized MoE equals the one-process MoE, on every layout and on routings that leave experts and ranks idle."""

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.layers import update_expert_bias
from moesaic.parallel import Meshes
from tests.distributed.parity import (
    LocalAdamW,
    assert_close,
    assert_gradients_close,
    assert_weights_close,
    legal_layouts,
    meshes_of,
)

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


class Reference(NamedTuple):
    moe: moesaic.MoE
    inputs: list[Tensor]
    targets: list[Tensor]
    outputs: list[Tensor]
    losses: list[Tensor]
    input_grads: list[Tensor]
    grads: list[dict[str, Tensor]]
    norms: list[Tensor]
    weights: dict[str, Tensor]


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


def set_routing(moe: moesaic.MoE, routing: str, step: int) -> None:
    moe.router.bias.zero_()
    for expert, bias in ROUTINGS[routing][step].items():
        moe.router.bias[expert % len(moe.router.bias)] = bias


def loss_of(moe: moesaic.MoE, x: Tensor, target: Tensor, mask: Tensor | None, num_tokens: int) -> tuple[Tensor, Tensor]:
    with moesaic.balance_losses() as losses:
        y = moe(x, mask)
    return y, (y - target).square().sum() / num_tokens + sum(losses)


def run_reference(routing: str, length: int, sizes: Sizes) -> Reference:
    moe = make_moe(routing, sizes)
    reference = Reference(copy.deepcopy(moe), [], [], [], [], [], [], [], {})
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2, foreach=False)
    for step in range(STEPS):
        set_routing(moe, routing, step)
        x, target = torch.randn(BATCH, length, DIM), torch.randn(BATCH, length, DIM)
        reference.inputs.append(x)
        reference.targets.append(target)
        x = x.clone().requires_grad_()
        y, loss = loss_of(moe, x, target, mask_of(step, length), BATCH * length)
        loss.backward()
        reference.outputs.append(y.detach())
        reference.losses.append(loss.detach())
        reference.input_grads.append(x.grad)
        reference.grads.append({n: p.grad.clone() for n, p in moe.named_parameters()})
        reference.norms.append(torch.nn.utils.clip_grad_norm_(moe.parameters(), torch.inf))
        optimizer.step()
        optimizer.zero_grad()
    update_expert_bias(moe)
    reference.weights.update({n: p.detach() for n, p in moe.named_parameters()}, bias=moe.router.bias)
    return reference


def check_run(reference: Reference, meshes: Meshes, routing: str, way: str, on_dtensors: bool) -> None:
    moe = moesaic.parallelize(copy.deepcopy(reference.moe), meshes, compute=way)
    make_optimizer = functools.partial(torch.optim.AdamW, moe.parameters(), foreach=False)
    optimizer = make_optimizer(lr=1e-2) if on_dtensors else LocalAdamW(moe, lr=1e-2)
    batch, length = reference.inputs[0].shape[:2]
    rows = slice(meshes.dp_rank * batch // meshes.dp_size, (meshes.dp_rank + 1) * batch // meshes.dp_size)
    mine = (rows, meshes.sequence_slice(length))
    for step in range(STEPS):
        set_routing(moe, routing, step)
        x = reference.inputs[step][mine].clone().requires_grad_()
        mask = mask_of(step, length)
        mask = None if mask is None else mask[mine]
        y, loss = loss_of(moe, x, reference.targets[step][mine], mask, batch * length)
        loss.backward()
        torch.distributed.all_reduce(loss := loss.detach())
        assert_close(f"output, step {step}", y.detach(), reference.outputs[step][mine])
        assert_close(f"loss, step {step}", loss.detach(), reference.losses[step])
        assert_close(f"input gradient, step {step}", x.grad, reference.input_grads[step][mine])
        assert_gradients_close(moe, reference.grads[step])
        norm = moesaic.clip_grad_norm_(moe.parameters(), torch.inf)
        assert_close(f"gradient norm, step {step}", norm, reference.norms[step])
        optimizer.step()
        optimizer.zero_grad()
    update_expert_bias(moe)
    assert_close("bias", moe.router.bias, reference.weights["bias"])
    assert_weights_close(moe, reference.weights)


@functools.cache
def references(length: int, sizes: Sizes) -> dict[str, Reference]:
    """Of every routing; the test process makes them once for all layouts and ranks."""
    with torch.random.fork_rng():
        return {routing: run_reference(routing, length, sizes) for routing in ROUTINGS}


def check_layout(
    layout: dict[str, int],
    expected: dict[str, Reference],
    runs: Sequence[tuple[str, str]] = ALL_RUNS,
    on_dtensors: bool = False,
) -> None:
    for way, routing in runs:
        try:
            check_run(expected[routing], meshes_of(layout), routing, way, on_dtensors)
        except Exception as error:
            raise AssertionError(f"{way}, {routing}") from error


LAYOUTS = [(n, layout) for n in (1, 2, 4, 8) for layout in legal_layouts(n)]
assert all(layout in legal_layouts(8) for layout in ON_DTENSORS)


def some_runs(world_size: int, layout: dict[str, int]) -> Sequence[tuple[str, str]]:
    """On 8 ranks one way with one routing, the pairs taking turns; `long` tests have all."""
    if world_size < 8:
        return ALL_RUNS
    return [ALL_RUNS[legal_layouts(8).index(layout) % len(ALL_RUNS)]]


def name_of(value: int | dict[str, int]) -> str:
    return str(value) if isinstance(value, int) else " ".join(f"{k}{v}" for k, v in value.items())


# A length that no tp divides.
@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=name_of)
def test_every_layout(same_ranks, world_size, layout):
    runs = some_runs(world_size, layout)
    same_ranks(check_layout, world_size, layout, references(5, EVEN), runs, on_dtensors=layout in ON_DTENSORS)


@pytest.mark.long
@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=name_of)
def test_every_layout_with_steps_on_dtensors(same_ranks, world_size, layout):
    same_ranks(check_layout, world_size, layout, references(5, EVEN), on_dtensors=True)


# A length shorter than tp.
@pytest.mark.parametrize("layout", [{"tp": 4, "ep": 2, "etp": 2}, {"tp": 4, "ep": 4}, {"tp": 2, "etp": 4}], ids=name_of)
def test_ranks_without_a_token(same_ranks, layout):
    same_ranks(check_layout, 4, layout, references(1, EVEN))
