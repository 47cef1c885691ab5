"""Initial weights are those of one process on every layout, uneven ones too; ranks that draw alone are stopped."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.layers import init_weights_
from moesaic.parallel import build_meshes, split_into_stages
from moesaic.parallel.split import name_in_whole
from tests.distributed.parity import meshes_of, whole

# Neither experts nor hidden dims divide.
CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=5, num_experts=5, top_k=2, shared_hidden_dim=4, logit_bias=True)


class Computed(nn.Module):
    """Weights that are computed of random numbers, whole or placed as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(7)), nn.Parameter(torch.empty(5, 3))
        self.moe = moesaic.MoE(CONFIG)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.a.copy_(torch.rand(7).log())
        self.b.copy_(torch.empty_like(self.b).uniform_(1, 2).neg_())


def model_on_meta(kind: str, **changes: Any) -> nn.Module:
    with torch.device("meta"):
        if kind == "layer":
            return moesaic.MoE(CONFIG)
        if kind == "computed":
            return Computed()
        config = Qwen3MoeConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=12,
            num_hidden_layers=2,
            mlp_only_layers=[1],
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            num_experts=6,
            num_experts_per_tok=2,
            pad_token_id=7,
            **changes,
        )
        return swap_moe(Qwen3MoeForCausalLM(config))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()} | {
        name: buffer.clone() for name, buffer in model.named_buffers()
    }


def check(layout: dict[str, int], kind: str, expected: dict[str, Tensor]) -> None:
    model = moesaic.parallelize(model_on_meta(kind), meshes_of(layout))
    torch.manual_seed(dist.get_rank())
    found = values(init_weights_(model, seed=3))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


LAYOUTS = [(2, {"ep": 2}), (2, {"tp": 2, "etp": 2}), (4, {"tp": 2, "ep": 2}), (4, {"dp_replicate": 2, "ep": 2})]


@pytest.mark.parametrize(
    ("ranks", "layout", "kind"),
    [(*where, kind) for where in LAYOUTS for kind in ("layer", "transformers model")] + [(2, {"ep": 2}, "computed")],
    ids=str,
)
def test_the_numbers_of_one_process(same_ranks, ranks, layout, kind):
    expected = values(init_weights_(model_on_meta(kind).to_empty(device="cpu"), seed=3))
    assert all(value.isfinite().all() for value in expected.values())
    same_ranks(check, ranks, layout, kind, expected)


def test_matrices_of_experts_have_the_spread_of_the_config():
    model = model_on_meta("transformers model", initializer_range=0.05).to_empty(device="cpu")
    moe = init_weights_(model, seed=3).model.layers[0].mlp
    for weight in (moe.experts.w1, moe.experts.w2, moe.router.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.15)


def check_stages(layout: dict[str, int], tied: bool, expected: dict[str, Tensor]) -> None:
    meshes = build_meshes(**layout, device_type="cpu")
    stages = split_into_stages(model_on_meta("transformers model", tie_word_embeddings=tied), meshes)
    moesaic.parallelize(stages, meshes)
    torch.manual_seed(dist.get_rank())
    for name, value in values(init_weights_(stages, seed=3)).items():
        name = name_in_whole(name)
        assert torch.equal(value, expected["model.embed_tokens.weight" if name not in expected else name]), name


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, {"pp": 2}), pytest.param(4, {"pp": 2, "tp": 2, "ep": 2}, marks=pytest.mark.slow)],
    ids=["pp2", "pp2 tp2 ep2"],
)
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "tied"])
def test_stages_have_the_numbers_of_one_process(same_ranks, ranks, layout, tied):
    whole_model = model_on_meta("transformers model", tie_word_embeddings=tied).to_empty(device="cpu")
    if tied:
        whole_model.tie_weights()
    same_ranks(check_stages, ranks, layout, tied, values(init_weights_(whole_model, seed=3)))


def check_refusals() -> None:
    meshes = meshes_of({"ep": 2})
    layer = moesaic.parallelize(model_on_meta("layer"), meshes)
    for module in (layer.router, layer.experts, layer.shared.w1):
        with pytest.raises(RuntimeError, match=r"every rank would draw alone.*init_weights_\(model, seed=0\)"):
            module.reset_parameters()
    experts = moesaic.GroupedExperts(4, 8, 6)
    shard = distribute_tensor(experts.w1.detach(), meshes.expert["ep"], [Shard(0)])
    experts.w1 = nn.Parameter(shard)
    with pytest.raises(RuntimeError, match="GroupedExperts: its parameters are DTensors on CPU"):
        experts.reset_parameters()


def test_ranks_do_not_draw_alone(same_ranks):
    same_ranks(check_refusals, 2)
