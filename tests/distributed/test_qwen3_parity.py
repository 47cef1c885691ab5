"""A parallelized Qwen3-MoE equals the one-process model, from logits to the weights after three steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe
from tests.distributed.parity import assert_close, assert_gradients_close, assert_weights_close

VOCAB, BATCH, LENGTH, STEPS = 61, 8, 7, 3
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


def check_model(layout: dict[str, int], tied: bool, recompute: bool, way: str) -> None:
    reference = make_model(tied=tied)
    model = copy.deepcopy(reference)
    torch.manual_seed(1)  # the same batches, however many random numbers a model takes
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    moesaic.parallelize(model, meshes, compute=way)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    models = (reference, model)
    # AdamW's first steps have the size of the learning rate however small a gradient is, and so blow up the rounding
    # errors of small ones: large weights and a small rate keep that below the tolerance.
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, foreach=False) for m in models]
    for m in models:
        m.train()
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    mine = meshes.sequence_slice(LENGTH)
    for step in range(STEPS):
        ids = torch.randint(VOCAB, (BATCH, LENGTH + 1))
        inputs, targets = ids[:, :-1], ids[:, 1:]
        expected_logits, expected_loss = loss_of(reference, inputs, targets, BATCH * LENGTH)
        logits, loss = loss_of(model, inputs[rows], targets[rows, mine], BATCH * LENGTH)
        expected_loss.backward()
        loss.backward()
        torch.distributed.all_reduce(loss := loss.detach())
        assert_close(f"logits, step {step}", logits.detach(), expected_logits[rows, mine].detach())
        assert_close(f"loss, step {step}", loss, expected_loss.detach())
        assert_gradients_close(model, {n: p.grad for n, p in reference.named_parameters()}, f", step {step}")
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        norm = moesaic.clip_grad_norm_(model.parameters(), 0.5)
        assert_close(f"gradient norm, step {step}", norm, expected_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_weights_close(model, dict(reference.named_parameters()))


def name_of(value: object) -> str | None:
    return " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=name_of)
def test_layout(ranks, world_size, layout):
    ranks(check_model, world_size, layout, tied=False, recompute=False, way="dtensor")


@pytest.mark.parametrize(
    ("tied", "recompute", "way"), [(True, False, "dtensor"), (False, True, "dtensor"), (False, True, "local")]
)
def test_tied_embeddings_and_recomputation(ranks, tied, recompute, way):
    ranks(check_model, 4, {"tp": 2, "ep": 2, "etp": 2}, tied=tied, recompute=recompute, way=way)
