"""``parallelize(recompute=)``: the bits of gradients, loads and losses do not change."""

import copy
import dataclasses

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.layers.lora import ExpertsAdapter, Rank, add_adapter
from moesaic.parallel import Meshes
from tests.distributed.parity import meshes_of, whole

CONFIG = Qwen3MoeConfig(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=16,
    moe_intermediate_size=12,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    attention_dropout=0.1,
    use_cache=False,
)
BATCH, LENGTH = 4, 7
WAYS = ("experts", "selective", "full")


def plain_model(adapters: bool) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    model = swap_moe(Qwen3MoeForCausalLM(CONFIG), aux_loss_coef=0.1, z_loss_coef=0.1)
    for module in model.modules():
        if isinstance(module, moesaic.MoE):
            # Drawn anew in each forward pass.
            module.router.config = module.config = dataclasses.replace(module.config, input_jitter=0.1)
            if adapters:
                module.experts.requires_grad_(False)
                ranks = {weight: Rank(3, 2.0) for weight in ("w1", "w3", "w2")}
                add_adapter(module.experts, "default", ExpertsAdapter(module.experts, ranks, dropout=0.2))
    return model.train()


def run(plain: torch.nn.Module, meshes: Meshes, **options: object) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, loss, balance losses and loads by name; and how often something was exchanged."""
    model = moesaic.parallelize(copy.deepcopy(plain), meshes, **options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(48, (BATCH, LENGTH), generator=generator)
    rows = slice(meshes.dp_rank * BATCH // meshes.dp_size, (meshes.dp_rank + 1) * BATCH // meshes.dp_size)
    torch.manual_seed(7 + meshes.dp_rank)
    with CommDebugMode() as comm:
        with moesaic.balance_losses() as losses:
            loss = model(input_ids=ids[rows], labels=ids[rows]).loss
        (loss + sum(losses)).backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    found |= {"loss": loss.detach(), "balance": torch.stack(losses).detach()} | moesaic.expert_load(model)
    sent = sum(n for op, n in comm.get_comm_counts().items() if "all_to_all" in str(op))
    return found, sent


def check(layout: dict[str, int], options: dict[str, object]) -> None:
    meshes, plain = meshes_of(layout), plain_model(options.pop("adapters", False))
    expected, sent = run(plain, meshes, **options)
    for way in WAYS:
        found, sends = run(plain, meshes, recompute=way, **options)
        assert found.keys() == expected.keys()
        for name, t in found.items():
            assert torch.equal(t, expected[name]), (way, name)
        # No token is sent twice for the experts. Attention gathers its sequence again.
        if way == "experts" or (way == "selective" and meshes.tp_size == 1):
            assert sends == sent, way
        elif way == "full" and meshes.layout.ep > 1:
            assert sends > sent


@pytest.mark.parametrize(
    ("ranks", "layout", "options"),
    [
        (2, {"ep": 2}, {}),
        (2, {"tp": 2, "ep": 2}, {"compute": "local"}),
        pytest.param(2, {}, {"compute": "local", "reshard_after_forward": False}, marks=pytest.mark.slow),
        pytest.param(2, {"ep": 2}, {"adapters": True}, marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2, "etp": 2}, {"capacity": 64}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "ep": 2}, {}, marks=pytest.mark.long),
        pytest.param(4, {"ep": 2, "etp": 2}, {"compute": "local", "capacity": 64}, marks=pytest.mark.slow),
    ],
    ids=["dp2 ep2", "tp2 ep2", "edp2", "adapters", "tp2 etp2", "dp2 tp2 edp2 ep2", "dp4 ep2 etp2"],
)
def test_recomputation_changes_no_bit(same_ranks, ranks, layout, options):
    same_ranks(check, ranks, layout, options)
