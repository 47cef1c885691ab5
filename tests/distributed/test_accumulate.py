"""Micro-batches: gradients of one process, summed over the ranks once a step."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import moesaic
from moesaic.layers import reset_expert_load
from moesaic.parallel import no_sync
from tests.distributed.parity import assert_close, assert_gradients_close, clip, meshes_of

CONFIG = moesaic.MoEConfig(
    dim=8, hidden_dim=6, num_experts=4, top_k=2, shared_hidden_dim=4, bias_update_speed=0.1, expert_biases=True
)
PASSES, LENGTH, BATCH, STEPS = 3, 5, 4, 2


def reductions(counts: dict[object, int]) -> int:
    return sum(n for op, n in counts.items() if "reduce" in str(op))


def check(layout: dict[str, int], compute: str) -> None:
    torch.manual_seed(0)
    # With tp 1 any module with MoE layers will do.
    plain = moesaic.MoE(CONFIG) if layout.get("tp", 1) > 1 else nn.Sequential(nn.Linear(8, 8), moesaic.MoE(CONFIG))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    meshes = meshes_of(layout)
    model = moesaic.parallelize(copy.deepcopy(plain), meshes, compute=compute)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    mine = (rows, meshes.sequence_slice(LENGTH))
    for step in range(STEPS):
        whole = torch.randn(PASSES, BATCH, LENGTH, 8)
        plain(whole).square().sum().backward()
        sent = []
        for i, x in enumerate(whole):
            last = i == PASSES - 1
            with CommDebugMode() as comm, nullcontext() if last else no_sync(model):
                with nullcontext() if last else no_sync(model):
                    pass  # one inside another ends nothing
                model(x[mine]).square().sum().backward()
            sent.append(reductions(comm.get_comm_counts()))
        assert sent[:-1] == [0] * (PASSES - 1)
        assert sent[-1] > 0
        when = f", step {step}, {compute}"
        assert_gradients_close(model, {name: p.grad for name, p in plain.named_parameters()}, when)
        assert_close(f"norm{when}", clip(model, 1.0), clip(plain, 1.0))
        for one in (plain, model):
            moesaic.update_expert_bias(one)
            reset_expert_load(one)
            one.zero_grad()
    biases = [[b for name, b in one.named_buffers() if name.endswith("router.bias")] for one in (plain, model)]
    assert torch.equal(*map(torch.stack, biases))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"tp": 2, "ep": 2}),
        (2, {"ep": 2}),
        (2, {}),
        pytest.param(4, {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"dp_replicate": 2, "etp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "etp": 2, "ep": 2}, marks=pytest.mark.slow),
    ],
    ids=["tp2 ep2", "dp2 ep2", "dp2 edp2", "dp2 tp2 edp2 ep2", "hsdp2x2 edp2 etp2", "dp2 tp2 ep2 etp2"],
)
def test_gradients_are_summed_once_a_step(same_ranks, ranks, layout):
    for compute in ("dtensor", "local"):
        same_ranks(check, ranks, layout, compute)
