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
from tests import policies
from tests.distributed.parity import LocalAdamW, assert_close, assert_gradients_close, assert_weights_close, meshes_of

VOCAB, BATCH, LENGTH, STEPS = 61, 8, 7, 3
# AdamW's first steps have the size of the learning rate however small a gradient is, and so blow up the rounding
# errors of small ones: large weights and a small rate keep that below the tolerance.
LR, MAX_NORM = 1e-3, 0.5
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


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    with moesaic.balance_losses() as losses:
        logits = model(input_ids=ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return logits, loss / num_tokens + sum(losses)


class Step(NamedTuple):
    inputs: Tensor
    targets: Tensor
    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]
    norm: Tensor


@functools.cache
def run_reference(tied: bool) -> tuple[list[Step], dict[str, Tensor]]:
    """Every step of one process, and the weights that follow; the test process runs it once for all ranks."""
    steps = []
    with torch.random.fork_rng():
        model = make_model(tied=tied).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        torch.manual_seed(1)  # the same batches, however many random numbers a model takes
        for _ in range(STEPS):
            ids = torch.randint(VOCAB, (BATCH, LENGTH + 1))
            inputs, targets = ids[:, :-1], ids[:, 1:]
            logits, loss = loss_of(model, inputs, targets, BATCH * LENGTH)
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            steps.append(Step(inputs, targets, logits.detach(), loss.detach(), grads, norm))
            optimizer.step()
            optimizer.zero_grad()
    return steps, {n: p.detach() for n, p in model.named_parameters()}


def check_model(
    layout: dict[str, int],
    reference: tuple[list[Step], dict[str, Tensor]],
    tied: bool,
    recompute: str | None,
    way: str,
) -> None:
    meshes = meshes_of(layout)
    model = moesaic.parallelize(make_model(tied=tied), meshes, compute=way).train()
    if recompute:
        model.gradient_checkpointing_enable(policies.options(recompute))
    on_dtensors = functools.partial(torch.optim.AdamW, model.parameters(), foreach=False)
    optimizer = on_dtensors(lr=LR) if layout == ON_DTENSORS else LocalAdamW(model, lr=LR)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    mine = meshes.sequence_slice(LENGTH)
    steps, weights = reference
    for i, expected in enumerate(steps):
        logits, loss = loss_of(model, expected.inputs[rows], expected.targets[rows, mine], BATCH * LENGTH)
        loss.backward()
        torch.distributed.all_reduce(loss := loss.detach())
        assert_close(f"logits, step {i}", logits.detach(), expected.logits[rows, mine])
        assert_close(f"loss, step {i}", loss, expected.loss)
        assert_gradients_close(model, expected.grads, f", step {i}")
        norm = moesaic.clip_grad_norm_(model.parameters(), MAX_NORM)
        assert_close(f"gradient norm, step {i}", norm, expected.norm)
        optimizer.step()
        optimizer.zero_grad()
    assert_weights_close(model, weights)


def name_of(value: object) -> str | None:
    return " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=name_of)
def test_layout(same_ranks, world_size, layout):
    same_ranks(check_model, world_size, layout, run_reference(False), tied=False, recompute=None, way="dtensor")


@pytest.mark.parametrize(
    ("tied", "recompute", "way"),
    [
        (True, None, "dtensor"),
        (False, "plain", "dtensor"),
        (False, "reentrant", "local"),
        (False, "torchtitan", "dtensor"),
        (False, "some", "local"),
    ],
)
def test_tied_embeddings_and_recomputation(same_ranks, tied, recompute, way):
    same_ranks(check_model, 4, ON_DTENSORS, run_reference(tied), tied=tied, recompute=recompute, way=way)
