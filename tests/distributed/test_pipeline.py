"""Pipelines of torch around our layers: each stage has meshes of its own, and all of it equals one process."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic.layers import attach_balance_losses, expert_load, uncounted, update_expert_bias
from tests.distributed.parity import assert_close, assert_gradients_close

B, S, D = 8, 6, 16
MICROBATCHES = 2
LOSS_SCALE = 1024.0
CONFIG = moesaic.MoEConfig(
    dim=D, hidden_dim=24, num_experts=4, top_k=2, aux_loss_coef=0.5, z_loss_coef=0.1, bias_update_speed=0.1
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.moe = moesaic.MoE(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def loss_fn(y: Tensor, target: Tensor) -> Tensor:
    return LOSS_SCALE * (y - target).square().sum() / (B * S)


def problem() -> tuple[list[Block], Tensor, Tensor]:
    """Two stages, a batch and its target."""
    torch.manual_seed(0)
    blocks = [Block().double(), Block().double()]
    for parameter in nn.ModuleList(blocks).parameters():
        nn.init.normal_(parameter, std=0.3)
    x, target = torch.randn(2, B, S, D, dtype=torch.float64).unbind()
    return blocks, x, target


class Expected(NamedTuple):
    """What a stage has after a step, and the norm of all gradients of the model."""

    grads: dict[str, Tensor]
    load: Tensor
    bias: Tensor
    norm: Tensor


def one_process(dp: int) -> list[Expected]:
    """A step of the whole model."""
    blocks, x, target = problem()
    model = nn.Sequential(*blocks)
    # A microbatch is that of all data-parallel ranks together.
    rows = torch.arange(B).view(dp, MICROBATCHES, -1).transpose(0, 1).flatten(1)
    for mine in rows:
        with moesaic.balance_losses() as losses:
            y = model(x[mine])
        (loss_fn(y, target[mine]) / LOSS_SCALE + sum(losses) / MICROBATCHES).backward()
    update_expert_bias(model)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return [
        Expected({n: p.grad for n, p in block.named_parameters()}, block.moe.router.load, block.moe.router.bias, norm)
        for block in model
    ]


def train_step(
    stages: list[Expected], schedule_of: Callable[..., Any], pp: int, dp: int, ep: int, compute: str
) -> None:
    axes = {"pp": pp, "dp_replicate": 1, "dp_shard": dp, "tp": 1}
    world = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    meshes = moesaic.build_meshes(mesh=world, ep=ep)
    index, group = world.get_local_rank("pp"), world["pp"].get_group()
    expected = stages[index]
    blocks, x, target = problem()
    # Each stage on its own ranks, whose other numbers are overwritten by those of the first of them.
    block = copy.deepcopy(blocks[index])
    if meshes.dp_rank > 0:
        nn.init.normal_(block.norm.weight)
    block = moesaic.parallelize(block, meshes, compute=compute)
    attach_balance_losses(block, LOSS_SCALE / MICROBATCHES)
    like = torch.empty(B // dp // MICROBATCHES, S, D, dtype=x.dtype, requires_grad=True)
    with uncounted():
        assert block(like).shape == like.shape
    stage = PipelineStage(block, index, pp, torch.device("cpu"), input_args=like, output_args=like, group=group)
    schedule = schedule_of(stage, MICROBATCHES, loss_fn=loss_fn, scale_grads=False)
    mine = slice(meshes.dp_rank * B // dp, (meshes.dp_rank + 1) * B // dp)
    with moesaic.balance_losses() as values:
        schedule.step(x[mine]) if index == 0 else schedule.step(target=target[mine])
    assert len(values) == 2 * MICROBATCHES
    assert not any(value.requires_grad for value in values)
    for parameter in block.parameters():
        parameter.grad /= LOSS_SCALE
    assert_gradients_close(block, expected.grads)
    assert torch.equal(expert_load(block)["moe.router"], expected.load)
    update_expert_bias(block)
    torch.testing.assert_close(block.moe.router.bias, expected.bias)
    assert_close("norm", moesaic.clip_grad_norm_(block.parameters(), 1.0, group=group), expected.norm)
    clipped = {name: grad / expected.norm for name, grad in expected.grads.items()}
    assert_gradients_close(block, clipped, " after clipping")


@pytest.mark.parametrize(
    ("schedule", "layout", "compute"),
    [
        (ScheduleGPipe, {"pp": 2, "dp": 1, "ep": 1}, "dtensor"),
        (Schedule1F1B, {"pp": 2, "dp": 1, "ep": 1}, "dtensor"),
        (Schedule1F1B, {"pp": 2, "dp": 2, "ep": 2}, "dtensor"),
        (ScheduleGPipe, {"pp": 2, "dp": 2, "ep": 1}, "local"),
    ],
)
def test_a_pipeline_equals_one_process(same_ranks, schedule, layout, compute):
    stages = one_process(layout["dp"])
    same_ranks(train_step, layout["pp"] * layout["dp"], stages, schedule, **layout, compute=compute)


def replayed(
    stages: list[tuple[Tensor, dict[str, Tensor]]], schedule_of: Callable[..., Any], checkpointed: bool
) -> None:
    """Microbatches of both stages go where another program sent their tokens."""
    world = init_device_mesh("cpu", (2, 1, 1, 1), mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
    index, group = world.get_local_rank("pp"), world["pp"].get_group()
    ids, expected = stages[index]
    blocks, x, target = problem()
    block = moesaic.parallelize(copy.deepcopy(blocks[index]), moesaic.build_meshes(mesh=world))
    if checkpointed:
        moe = block.moe.forward
        block.moe.forward = lambda *args: checkpoint(moe, *args, use_reentrant=False)
    like = torch.empty(B // MICROBATCHES, S, D, dtype=x.dtype, requires_grad=True)
    stage = PipelineStage(block, index, 2, torch.device("cpu"), input_args=like, output_args=like, group=group)
    schedule = schedule_of(stage, MICROBATCHES, loss_fn=loss_fn, scale_grads=False)
    # One layer, a pass for each microbatch: the order in which a stage calls its layer.
    record = moesaic.routing.Record()
    record.layers = [[moesaic.routing.Pass(part.flatten(0, 1), None) for part in ids.chunk(MICROBATCHES)]]
    with moesaic.routing.replay(record), moesaic.routing.record() as again:
        schedule.step(x) if index == 0 else schedule.step(target=target)
    assert torch.equal(torch.cat([p.ids for p in again.layers[0]]), ids.flatten(0, 1))
    assert len(again.layers[0]) == MICROBATCHES
    assert_gradients_close(block, expected)


@pytest.mark.parametrize(
    ("schedule", "checkpointed"),
    [
        (Schedule1F1B, True),
        pytest.param(Schedule1F1B, False, marks=pytest.mark.long),
        pytest.param(ScheduleGPipe, True, marks=pytest.mark.long),
        pytest.param(ScheduleGPipe, False, marks=pytest.mark.long),
    ],
)
def test_routing_is_played_in_a_pipeline(same_ranks, schedule, checkpointed):
    blocks, x, target = problem()
    model = nn.Sequential(*blocks)
    with moesaic.routing.record() as r, torch.no_grad():
        model(x)
    # Other experts than by score.
    routed = (r.routed_experts().long() + 1) % CONFIG.num_experts
    with moesaic.routing.replay(moesaic.routing.Record.from_routed_experts(routed)):
        loss_fn(model(x), target).backward()
    ids = routed.unflatten(0, (B, S)).unbind(2)
    gradients = [{name: p.grad for name, p in block.named_parameters()} for block in blocks]
    same_ranks(replayed, 2, list(zip(ids, gradients, strict=True)), schedule, checkpointed)
