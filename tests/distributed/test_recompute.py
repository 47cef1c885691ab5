"""Activation checkpointing of a parallelized layer, with every policy: the gradients of one process without it."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import moesaic
from tests.distributed.parity import assert_close, assert_gradients_close, meshes_of
from tests.policies import WAYS, recomputed

pytestmark = pytest.mark.slow

CONFIG = moesaic.MoEConfig(
    dim=8,
    hidden_dim=6,
    num_experts=8,
    top_k=2,
    num_groups=4,
    top_groups=2,
    aux_loss_coef=0.1,
    z_loss_coef=0.1,
    bias_update_speed=0.1,
    shared_hidden_dim=4,
)
LENGTH, BATCH = 5, 4


class Reference(NamedTuple):
    layer: moesaic.MoE
    x: Tensor
    input_grad: Tensor
    grads: dict[str, Tensor]
    load: Tensor


def twice(layer: moesaic.MoE, x: Tensor) -> Tensor:
    return layer(layer(x.sin())).cos()


def run_reference() -> Reference:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = moesaic.MoE(CONFIG)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        untouched = copy.deepcopy(layer)
        x = torch.randn(BATCH, LENGTH, CONFIG.dim, requires_grad=True)
        with moesaic.balance_losses() as losses:
            y = twice(layer, x)
        (y.square().sum() / BATCH / LENGTH + sum(losses)).backward()
        grads = {name: p.grad for name, p in layer.named_parameters()}
        return Reference(untouched, x.detach(), x.grad, grads, layer.router.load)


def check(layout: dict[str, int], reference: Reference, way: str) -> None:
    meshes = meshes_of(layout)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    mine = (rows, meshes.sequence_slice(LENGTH))
    for compute in ("dtensor", "local"):
        layer = moesaic.parallelize(copy.deepcopy(reference.layer), meshes, compute=compute)
        x = reference.x[mine].clone().requires_grad_()
        with moesaic.balance_losses() as losses:
            y = recomputed(way, lambda x, layer=layer: twice(layer, x), x)
        (y.square().sum() / BATCH / LENGTH + sum(losses)).backward()
        assert_gradients_close(layer, reference.grads, f", {compute}")
        assert_close("input gradient", x.grad, reference.input_grad[mine])
        assert torch.equal(moesaic.expert_load(layer)["router"], reference.load)


# In the second, FSDP shards the dense parameters and not the experts; in the third it shards both.
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, {"tp": 2, "ep": 2}), (2, {"ep": 2}), (4, {"tp": 2, "ep": 2})],
    ids=["tp2 ep2", "dp2 ep2", "dp2 tp2 edp2 ep2"],
)
def test_a_checkpoint_changes_no_gradient(same_ranks, ranks, layout, way):
    same_ranks(check, ranks, layout, run_reference(), way)
