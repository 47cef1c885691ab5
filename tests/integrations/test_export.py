"""Swap in, train, export, load in plain transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import export_pretrained, swap_moe


def make_model(**changes: object) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "use_cache": False,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(sizes | changes))).eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(input_ids=torch.randint(61, (2, 9), generator=generator)).logits


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": True}, {"tie_word_embeddings": True}, {"mlp_only_layers": [0]}]
)
def test_swapping_in_changes_nothing_but_rounding(changes):
    model = make_model(**changes)
    expected = logits_of(model)
    swap_moe(model)
    assert sum(isinstance(m, moesaic.MoE) for m in model.modules()) == 2 - len(model.config.mlp_only_layers)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"mlp_only_layers": [0]}])
def test_weights_go_in_and_out_exactly(tmp_path, changes):
    model = make_model(**changes)
    expected = {n: p.clone() for n, p in model.state_dict().items()}
    export_pretrained(swap_moe(model), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name


def train_and_export(folder: str, layout: dict[str, int]) -> None:
    model = swap_moe(make_model()).train()
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    moesaic.parallelize(model, meshes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    export_pretrained(model, folder)
    model.eval()
    with torch.no_grad():
        mine = model(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(mine, logits_of(plain)[:, meshes.sequence_slice(9)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2, "etp": 2}, {"tp": 2}], ids=["ep2 etp2", "edp4"])
def test_a_trained_parallel_model_loads_in_plain_transformers(ranks, tmp_path, layout):
    ranks(train_and_export, 4, str(tmp_path), layout)
    before, after = logits_of(make_model()), logits_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert not torch.allclose(before, after)


def test_a_model_without_blocks_is_refused():
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no MoE block; moesaic.MoE replaces"):
        swap_moe(model)


def test_frozen_blocks_stay_frozen():
    model = make_model().requires_grad_(False)
    model.model.layers[0].mlp.gate.weight.requires_grad_(True)
    swap_moe(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["model.layers.0.mlp.router.weight"]


def test_export_refuses_what_the_architecture_has_no_place_for(tmp_path):
    model = swap_moe(make_model())
    config = moesaic.MoEConfig(dim=32, hidden_dim=12, num_experts=8, top_k=3, bias_update_speed=0.1)
    model.model.layers[1].mlp = moesaic.MoE(config)
    with pytest.raises(ValueError, match=r"swap_moe did not make the layer 'model.layers.1.mlp'"):
        export_pretrained(model, tmp_path)
