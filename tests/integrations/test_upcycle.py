"""Dense models made into mixtures of experts: the same function at first, and one that trains."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from moesaic.integrations.transformers import load_pretrained
from moesaic.integrations.transformers.upcycle import upcycle
from tests.integrations.families import assert_close, token_ids

pytestmark = pytest.mark.slow

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {
    "Llama": ("Mixtral", {}),
    "Mistral": ("Mixtral", {"sliding_window": 5}),
    "Qwen2": ("Qwen2Moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "Qwen3": ("Qwen3Moe", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}


def make_dense(family, folder, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(_SIZES | DENSE[family][1] | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.2) if p.ndim > 1 or "bias" in name else p.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("sizes", [(4, 2, 1), (12, 6, 3)], ids=str)
def test_the_first_logits_are_the_dense_ones(tmp_path, family, sizes):
    dense = make_dense(family, tmp_path / "dense")
    experts, top_k, granularity = sizes
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=experts, top_k=top_k, granularity=granularity)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert type(model).__name__ == f"{DENSE[family][0]}ForCausalLM"
    ids = token_ids(3, 17)
    expected = dense(input_ids=ids).logits.detach()
    assert_close(model(input_ids=ids).logits.detach(), expected, family, rtol=1e-5)
    assert_close(load_pretrained(tmp_path / "moe")(input_ids=ids).logits.detach(), expected, family, rtol=1e-5)
    rows = model.model.layers[0].mlp.gate.weight.view(experts // granularity, granularity, -1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len(rows[:, 0].unique(dim=0)) == experts // granularity


def test_it_trains(tmp_path):
    make_dense("Qwen2", tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=8, top_k=4, granularity=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = token_ids(2, 17)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert model.model.layers[0].mlp.shared_expert.down_proj.weight.abs().max() > 0


def test_noise_is_the_fraction_asked(tmp_path):
    dense = make_dense("Llama", tmp_path / "dense")
    sizes = {"experts": 4, "top_k": 2}
    for seed in (0, 1):
        out = tmp_path / f"moe{seed}"
        upcycle(tmp_path / "dense", out, **sizes, noise=0.1, seed=seed)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"moe{seed}") for seed in (0, 1)]
    (first, other) = (m.model.layers[1].mlp.experts.down_proj.detach() for m in models)
    weight = dense.model.layers[1].mlp.down_proj.weight.detach()
    for expert in first:
        assert abs(float((expert - weight).std() / weight.std()) - 0.1) < 0.01
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, other)
    upcycle(tmp_path / "dense", tmp_path / "again", **sizes, noise=0.1)
    with pytest.raises(ValueError, match="out: .* is also the source"):
        upcycle(tmp_path / "dense", tmp_path / "dense", **sizes)
    with pytest.raises(ValueError, match="out: .* already exists and is not empty"):
        upcycle(tmp_path / "dense", tmp_path / "again", **sizes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), models[0].parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"experts": 4, "top_k": 6}, "top_k: 6 is more than the 4 experts"),
        ({"experts": 6, "top_k": 4, "granularity": 4}, "experts: 6 is not a multiple of granularity 4"),
        ({"experts": 8, "top_k": 3, "granularity": 2}, "top_k: 3 is not a multiple of granularity 2"),
        ({"experts": 10, "top_k": 5, "granularity": 5}, "granularity: 5 does not divide the hidden dim 48"),
        ({"experts": 0, "top_k": 1}, "experts: must be at least 1, got 0"),
        ({"experts": 4, "top_k": 2, "noise": -1.0}, "noise: must be at least 0, got -1.0"),
    ],
)
def test_numbers_that_do_not_go_together(tmp_path, sizes, message):
    make_dense("Llama", tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        upcycle(tmp_path / "dense", tmp_path / "moe", **sizes)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Llama", {"attention_bias": True}, "attention_bias is True, but MixtralConfig has no attention_bias"),
        ("Llama", {"mlp_bias": True}, "mlp_bias is True, but MixtralConfig has no mlp_bias"),
        ("Qwen3", {"use_sliding_window": True}, "use_sliding_window is True, but Qwen3MoeConfig has no"),
    ],
)
def test_models_that_do_not_fit(tmp_path, family, changes, message):
    make_dense(family, tmp_path / "dense", **changes)
    with pytest.raises(ValueError, match=message):
        upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, top_k=2)


def test_other_models_are_refused_by_type(tmp_path):
    make_dense("Llama", tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, top_k=2)
    with pytest.raises(ValueError, match="dense: cannot upcycle the type 'mixtral'; use one of llama, mistral"):
        upcycle(tmp_path / "moe", tmp_path / "again", experts=4, top_k=2)
