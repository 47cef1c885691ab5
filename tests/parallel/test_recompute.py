"""``parallelize(recompute=)`` on one process: what is kept, what is copied, and what is refused."""

import copy
import json

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe

CONFIG = moesaic.MoEConfig(dim=16, hidden_dim=64, num_experts=4, top_k=2)
T = 256


def layer(recompute: str) -> moesaic.MoE:
    torch.manual_seed(0)
    # The CPU kernels take memory of their own pool, which keeps it.
    return moesaic.parallelize(moesaic.MoE(CONFIG, impl="torch"), moesaic.build_meshes(), recompute=recompute)


def language_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        num_experts=2,
        num_experts_per_tok=1,
    )
    return swap_moe(Qwen3MoeForCausalLM(config))


def kept_by(moe: moesaic.MoE, x: torch.Tensor, trace: str) -> int:
    """Bytes that a forward pass leaves behind, by torch's own accounting."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = moe(x)
    profile.export_chrome_trace(trace)
    with open(trace) as file:
        changes = [e["args"]["Bytes"] for e in json.load(file)["traceEvents"] if e["name"] == "[memory]"]
    y.sum().backward()
    return sum(changes)


def test_each_way_keeps_less(tmp_path):
    x = torch.randn(T, CONFIG.dim, requires_grad=True)
    kept = {way: kept_by(layer(way), x, str(tmp_path / way)) for way in ("none", "experts", "selective", "full")}
    # Two pre-activations of each copy of a token.
    hidden = 2 * T * CONFIG.top_k * CONFIG.hidden_dim * 4
    assert kept["none"] - kept["experts"] >= 0.95 * hidden
    assert kept["full"] < kept["selective"] < kept["experts"]


def test_a_copy_computes_again_for_itself():
    one = layer("full")
    other = copy.deepcopy(one)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(3, CONFIG.dim)
    other(x).sum().backward()
    assert all(p.grad is None for p in one.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_a_cache_is_not_kept():
    model = moesaic.parallelize(language_model(), moesaic.build_meshes(), recompute="full")
    ids = torch.arange(6).view(1, 6)
    with pytest.warns(UserWarning, match="recompute: no cache is kept .*use_cache=False"):
        loss = model(input_ids=ids, labels=ids, use_cache=True).loss
    loss.backward()
    with torch.no_grad():
        assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 6


def test_what_is_refused(unchecked):
    with pytest.raises(ValueError, match="recompute: got 'all'; choose one of 'none', 'full', 'selective', 'experts'"):
        layer("all")
    model = language_model()
    model.model.layers[0].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing of transformers is on in '.*disable"):
        moesaic.parallelize(model, moesaic.build_meshes(), recompute="experts")
