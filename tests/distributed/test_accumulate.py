"""Micro-batches: gradients of one process, summed over the ranks once a step."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic
from moesaic.layers import reset_expert_load
from moesaic.parallel import Pipeline, PipelineConfig, build_meshes, no_sync, split_into_stages
from moesaic.parallel.split import name_in_whole
from tests.distributed.parity import assert_close, assert_gradients_close, clip, meshes_of
from tests.distributed.parity import whole as gathered
from tests.distributed.test_stages import BATCH as BATCH_OF_STAGES
from tests.distributed.test_stages import LENGTH as LENGTH_OF_STAGES
from tests.distributed.test_stages import loss_of, model_of
from tests.integrations.families import VOCAB

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


class Reductions(TorchDispatchMode):
    """Counts sums of FSDP and of DTensors. CommDebugMode follows modules, and a stage calls some on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.scattered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.scattered += "_reduce_scatter_base" in str(func)
        self.reduced += "_c10d_functional.all_reduce" in str(func)
        return func(*args, **kwargs or {})


def is_partial(parameter: nn.Parameter) -> bool:
    assert parameter.grad is not None
    return isinstance(parameter.grad, DTensor) and any(p.is_partial() for p in parameter.grad.placements)


def check_stages(layout: dict[str, int], schedule: str) -> None:
    """Several schedules before a step, of stages that share a weight."""
    plain = model_of("Qwen3-MoE", num_hidden_layers=4, tie_word_embeddings=True)
    ids = torch.randint(3, VOCAB, (BATCH_OF_STAGES, LENGTH_OF_STAGES), generator=torch.Generator().manual_seed(1))
    targets, reference = ids.roll(-1, 1), copy.deepcopy(plain)
    meshes = build_meshes(**layout, device_type="cpu")
    stages = split_into_stages(copy.deepcopy(plain), meshes, PipelineConfig(schedule=schedule))
    pipeline = Pipeline(moesaic.parallelize(stages, meshes), microbatches=2, accumulate=2)
    part = meshes.sequence_positions(LENGTH_OF_STAGES)
    for step in range(STEPS):
        # The second step adds to what is there.
        with moesaic.balance_losses() as losses:
            expected = loss_of(reference(input_ids=ids).logits, targets)
        (expected + sum(losses)).backward()
        sent: list[Reductions] = []
        partial = 0
        for i, rows in enumerate(torch.arange(BATCH_OF_STAGES).view(meshes.dp_size, 2, -1)[meshes.dp_rank]):
            with Reductions() as reductions, nullcontext() if i else no_sync(stages):
                pipeline.step(ids[rows], targets[rows][:, part], loss_of)
            sent.append(reductions)
            if i == 0 and "tp" in layout:
                partial = sum(map(is_partial, stages.parameters()))
        if "dp_shard" in layout:
            assert sent[0].scattered == 0
            assert sent[1].scattered > 0
        if "tp" in layout:
            # Each once, and not for each microbatch.
            assert sent[1].reduced - sent[0].reduced == partial > 0
            assert not any(map(is_partial, stages.parameters()))
        for name, parameter in stages.named_parameters():
            name = name_in_whole(name)
            wanted = dict(reference.named_parameters(remove_duplicate=False))[name].grad
            assert_close(f"gradient of {name}, {layout}, step {step}", gathered(parameter.grad), wanted)


@pytest.mark.parametrize(
    ("ranks", "layout", "schedule"),
    [
        (2, {"pp": 2}, "1f1b"),
        pytest.param(4, {"pp": 2, "dp_shard": 2, "ep": 2}, "1f1b", marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "dp_shard": 2}, "interleaved", marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "tp": 2, "ep": 2}, "1f1b", marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "tp": 2, "ep": 2}, "zero-bubble", marks=pytest.mark.slow),
    ],
    ids=["pp2", "pp2 dp2 ep2", "pp2 dp2 edp2", "pp2 tp2 ep2", "pp2 tp2 ep2 zero-bubble"],
)
def test_schedules_of_a_pipeline_are_summed_once_a_step(same_ranks, ranks, layout, schedule):
    same_ranks(check_stages, ranks, layout, schedule)
