"""Whole-model plans of every family on four ranks against one process: logits, loss, gradients, an optimizer step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.layers import expert_load
from tests.distributed.parity import LocalAdamW, assert_close, assert_gradients_close, assert_weights_close, meshes_of
from tests.distributed.test_plan import fake_meshes
from tests.distributed.test_qwen3_parity import name_of
from tests.integrations.families import VOCAB, make_model
from tests.integrations.test_swap import SWAPPED

pytestmark = pytest.mark.slow

BATCH, LENGTH = 4, 11
# Two heads of queries for each of keys, and as many of these as the widest layout has ranks.
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
_LATENT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
# Family -> what its config has that the other tests' has not.
PLANNED: dict[str, dict[str, Any]] = {
    "Mixtral": _HEADS,
    "Qwen2-MoE": _HEADS,
    "Qwen3-MoE": _HEADS,
    "OLMoE": {**_HEADS, "clip_qkv": 2.0},
    # As its Lite model: queries without a latent.
    "DeepSeek-V2": {**_LATENT_HEADS, "q_lora_rank": None},
    "DeepSeek-V3": {**_LATENT_HEADS, "attention_bias": True},
    "GLM-4-MoE": {**_HEADS, "use_qk_norm": True, "attention_bias": True},
    # A window that the sequence is longer than.
    "gpt-oss": {**_HEADS, "sliding_window": 4},
    "Granite-MoE": {**_HEADS, "attention_bias": True},
    "Llama-4": {**_HEADS, "no_rope_layers": [1, 0]},
    "MiniMax-M2": _HEADS,
    "Ernie-4.5-MoE": _HEADS,
    "Aria": _HEADS,
}
LAYOUTS = [{"tp": 2, "ep": 2, "etp": 2}, {"tp": 4, "ep": 4}, {"tp": 2, "ep": 2}]


def labels_of(ids: Tensor) -> Tensor:
    """Some do not count, and more so in the first sequences: ranks have different numbers of those that do."""
    generator = torch.Generator().manual_seed(3)
    leave_out = torch.rand(ids.shape, generator=generator) < torch.linspace(0.7, 0.1, len(ids)).unsqueeze(1)
    return ids.masked_fill(leave_out, -100)


def padding_of(ids: Tensor) -> Tensor:
    """Left and right, so that of a sequence's shards some are nothing but padding."""
    first, last = torch.tensor([[0, LENGTH], [7, LENGTH], [0, 2], [3, LENGTH]]).mT
    position = torch.arange(LENGTH)
    return ((position >= first.unsqueeze(1)) & (position < last.unsqueeze(1))).long()


def run(model: nn.Module, **batch: Tensor) -> tuple[Any, Tensor]:
    """What the model gives, and its losses. Calls backward."""
    with moesaic.balance_losses() as losses:
        out = model(**batch)
    total = torch.stack([out.loss, *losses])
    total.sum().backward()
    return out, total.detach()


def check_family(family: str, changes: dict[str, Any], layouts: list[dict[str, int]], recompute: bool = False) -> None:
    model = make_model(family, **changes, use_cache=False)
    plain = swap_moe(model, aux_loss_coef=0.5, z_loss_coef=0.1).train()
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = padding_of(ids)
    labels = labels_of(ids).masked_fill(mask == 0, -100)
    reference, expected = copy.deepcopy(plain), None
    for layout in layouts:
        model = copy.deepcopy(plain)
        meshes = meshes_of(layout)
        moesaic.parallelize(model, meshes)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if expected is None:
            expected, expected_losses = run(reference, input_ids=ids, attention_mask=mask, labels=labels)
            load = expert_load(reference)
            step(reference)
        rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
        actual, loss = run(model, input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows])
        torch.distributed.all_reduce(loss)
        when = f", {name_of(layout)}"
        mine = expected.logits[rows, meshes.sequence_slice(LENGTH)]
        assert_close(f"logits{when}", actual.logits.detach(), mine.detach())
        assert_close(f"losses{when}", loss, expected_losses)
        assert all(torch.equal(theirs, load[name]) for name, theirs in expert_load(model).items()), when
        assert_gradients_close(model, {n: p.grad for n, p in reference.named_parameters()}, when)
        step(model)
        assert_weights_close(model, dict(reference.named_parameters()))


def step(model: nn.Module) -> None:
    # Without an eps near the size of gradients the first step is their sign, that of rounding errors too.
    LocalAdamW(model.parameters(), lr=1e-2, eps=1e-3).step()


@pytest.mark.parametrize("family", PLANNED)
def test_family(same_ranks, family):
    same_ranks(check_family, 4, family, PLANNED[family], LAYOUTS)


def test_recomputation(same_ranks):
    same_ranks(check_family, 4, "DeepSeek-V3", PLANNED["DeepSeek-V3"], LAYOUTS[:1], recompute=True)


@pytest.mark.parametrize("family", sorted(set(SWAPPED) - set(PLANNED)))
def test_without_tp_any_attention_will_do(same_ranks, family):
    same_ranks(check_family, 4, family, {}, [{"ep": 2, "etp": 2}])


REFUSED = {
    "Qwen3-Next": r"layer 0's linear_attn \(Qwen3NextGatedDeltaNet\) is not known to the plan. .*; use tp=1",
    "MiniMax": r"layer 1's attention: 'norm' \(MiniMaxRMSNorm\) of MiniMaxLightningAttention is not known .* use tp=1",
}


@pytest.mark.parametrize("family", REFUSED)
def test_modules_that_the_plan_does_not_know_are_refused_by_name(family):
    with pytest.raises(ValueError, match=REFUSED[family]):
        moesaic.parallelize(swap_moe(make_model(family)), fake_meshes(2, tp=2))


@pytest.mark.parametrize("family", PLANNED)
def test_heads_are_whole(family):
    with pytest.raises(ValueError, match="16 does not divide the 8 heads of 'q_.*proj'; choose from .1, 2, 4, 8"):
        moesaic.parallelize(swap_moe(make_model(family, **PLANNED[family])), fake_meshes(16, tp=16, ep=2))
    if not family.startswith("DeepSeek"):
        with pytest.raises(
            ValueError, match="8 does not divide the 4 heads of 'k_proj'; choose from .1, 2, 4.; or use"
        ):
            moesaic.parallelize(swap_moe(make_model(family, **PLANNED[family])), fake_meshes(8, tp=8, ep=2))


def test_projections_that_are_no_linear_layers_are_refused():
    model = swap_moe(make_model("Mixtral"))
    model.model.layers[1].self_attn.k_proj = nn.Sequential(nn.Linear(32, 16))
    with pytest.raises(
        ValueError, match=r"layer 1's attention: 'k_proj' \(Sequential\) .* is not a linear layer.*; or use tp=1"
    ):
        moesaic.parallelize(model, fake_meshes(2, tp=2))
    model = swap_moe(make_model("Mixtral"))
    model.model.layers[0].self_attn.lora = nn.Linear(32, 16)
    with pytest.raises(ValueError, match=r"layer 0's attention: 'lora' \(Linear\) of MixtralAttention is not known"):
        moesaic.parallelize(model, fake_meshes(2, tp=2))


def check_other_dtype() -> None:
    reference = swap_moe(make_model("Ernie-4.5-MoE")).bfloat16()
    for layer in reference.modules():
        if isinstance(layer, moesaic.MoE):
            layer.router.float()
    model = moesaic.parallelize(copy.deepcopy(reference), moesaic.build_meshes(ep=2, device_type="cpu"))
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    reference(input_ids=ids, labels=ids).loss.backward()
    rank = torch.distributed.get_rank()
    model(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad.dtype == q.dtype, name
        assert (p.grad.full_tensor() - q.grad).norm() < 0.03 * q.grad.norm(), name


def test_parameters_of_two_dtypes_over_dp(same_ranks):
    same_ranks(check_other_dtype, 2)


def test_heads_that_may_read_whole_sequences_are_refused():
    config = make_model("Qwen3-MoE").config
    model = swap_moe(AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(ValueError, match="Qwen3MoeForSequenceClassification may expect hidden states of whole"):
        moesaic.parallelize(model, fake_meshes(2, tp=2))
