"""A parallelized Qwen3-MoE equals the one-process model, from logits to the weights after three steps."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.testing import Layout
from tests import policies
from tests.distributed.parity import LocalAdamW, clip, meshes_of

pytestmark = pytest.mark.slow

VOCAB, BATCH, LENGTH, STEPS = 61, 8, 7, 3
# AdamW's first steps have the size of the learning rate however small a gradient is, and so blow up the rounding
# errors of small ones: large weights and a small rate keep that below the tolerance.
LR = 1e-3
# Where the optimizer steps on DTensors, as users' do; elsewhere on their local shards, which is faster.
ON_DTENSORS = {"tp": 2, "ep": 2, "etp": 2}
LAYOUTS = [
    (1, {}),
    (2, {"tp": 2, "ep": 2}),
    (4, {"tp": 2, "ep": 2, "etp": 2}),
    (4, {"tp": 4, "ep": 4}),
    (4, {"ep": 2}),
    (4, {"dp_replicate": 2, "etp": 2}),
    (8, {"tp": 2, "dp_replicate": 2, "ep": 2, "etp": 2}),
    (8, {"tp": 4, "ep": 4}),
]


def make_model(*, tied: bool) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=12,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        attention_bias=False,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        use_cache=False,
    )
    return swap_moe(Qwen3MoeForCausalLM(config), aux_loss_coef=0.02, z_loss_coef=0.001)


class Run(NamedTuple):
    """One way of computing, with or without recomputation; its methods are the functions of a check."""

    way: str = "dtensor"
    recompute: str | None = None

    def parallelize(self, model: Qwen3MoeForCausalLM, layout: Layout) -> nn.Module:
        model = moesaic.parallelize(model, meshes_of(layout), compute=self.way)
        if self.recompute:
            model.gradient_checkpointing_enable(policies.options(self.recompute))
        return model


def inputs(rank: int, layout: Layout) -> list[dict[str, Tensor]]:
    meshes = meshes_of(layout)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    ids = torch.randint(VOCAB, (STEPS, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))[:, rows]
    targets = ids[:, :, 1:][:, :, meshes.sequence_slice(LENGTH)]
    return [{"ids": i, "targets": t} for i, t in zip(ids[:, :, :-1], targets, strict=True)]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with moesaic.balance_losses() as losses:
        logits = model(input_ids=batch["ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    return loss / (BATCH * LENGTH) + sum(losses)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, foreach=False)


def check_layouts(equal_gradients, layouts: list[Layout], run: Run, tied: bool = False, optimizer=None) -> None:
    equal_gradients(
        functools.partial(make_model, tied=tied),
        inputs,
        run.parallelize,
        layouts,
        loss=loss_of,
        clip=clip,
        optimizer=optimizer or functools.partial(LocalAdamW, lr=LR),
        steps=STEPS,
    )


def name_of(value: object) -> str | None:
    return " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=name_of)
def test_layout(equal_gradients, world_size, layout):
    optimizer = adamw if layout == ON_DTENSORS else None
    check_layouts(equal_gradients, [Layout(layout, world_size)], Run(), optimizer=optimizer)


@pytest.mark.parametrize(
    ("tied", "run"),
    [
        (True, Run()),
        (False, Run("dtensor", "plain")),
        (False, Run("local", "reentrant")),
        (False, Run("dtensor", "torchtitan")),
        (False, Run("local", "some")),
    ],
)
def test_tied_embeddings_and_recomputation(equal_gradients, tied, run):
    check_layouts(equal_gradients, [Layout(ON_DTENSORS, 4)], run, tied)
