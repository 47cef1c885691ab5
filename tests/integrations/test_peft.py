"""Adapters of models with our layers: what plain peft computes, in its files and back."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moesaic
from moesaic.integrations.transformers import export_pretrained, load_pretrained, swap_moe, unswap_moe
from moesaic.layers import quantize_
from tests.integrations.families import assert_close, make_model, token_ids

peft = pytest.importorskip("peft")
from moesaic.integrations.peft import (  # noqa: E402, needs peft
    add_adapters,
    disable_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
    set_adapter,
)
from moesaic.integrations.peft.add import factors_of  # noqa: E402
from moesaic.integrations.peft.files import in_files  # noqa: E402
from moesaic.integrations.peft.switch import adapters_of  # noqa: E402

# peft asks for an old name of a property of transformers, and warns of a pattern that it has made itself.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following \\w+_pattern keys did not match:RuntimeWarning"),
]

FILE = "adapter_model.safetensors"
# The block's name in a layer, the router's in the block, and that of the first projection.
NAMES = {
    "Llama-4": ("feed_forward", "router", "gate_up_proj"),
    "gpt-oss": ("mlp", "router", "gate_up_proj"),
    "Granite-MoE": ("block_sparse_moe", "router", "gate_up_proj"),
    "Aria": ("mlp", "router", "gate_up_proj"),
    "Nemotron-H": ("mixer", "gate", "up_proj"),
}
# Weights as in linear layers, and as in products, whose dims peft exchanges. Others are interleaved, or without a gate.
SOME = ("Mixtral", "Llama-4")
OTHERS = (
    "gpt-oss",
    "Nemotron-H",
    "Qwen3-MoE",
    "DeepSeek-V3",
    "Qwen2-MoE",
    "Granite-MoE",
    "Aria",
    "MiniMax-M2",
    "OLMoE",
    "GLM-4-MoE",
)


def config_of(family: str, **changes: Any) -> Any:
    block, gate, up = NAMES.get(family, ("mlp", "gate", "gate_up_proj"))
    experts = [f"{block}.experts.{up}", f"{block}.experts.down_proj", f"{block}.{gate}.weight"]
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "kv_b_proj"]}
    return peft.LoraConfig(**(settings | {"target_parameters": experts} | changes))


def draw(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def by_peft(base: Any, config: Any, seed: int = 1) -> Any:
    return draw(peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)), seed)


def gradients(model: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for target in adapters_of(model, "default"):
        found |= dict(in_files(target, {n: p.grad for n, p in factors_of(model, target, "default")}))
    return found


@pytest.mark.parametrize("family", [*SOME, *(pytest.param(f, marks=pytest.mark.long) for f in OTHERS)])
def test_it_is_what_peft_makes_of_the_plain_model(tmp_path, family):
    base, ids = make_model(family), token_ids(2, 9)
    plain = by_peft(base, config_of(family))
    plain.save_pretrained(tmp_path / "theirs")
    expected = plain(input_ids=ids, labels=ids)
    expected.loss.backward()

    model = swap_moe(copy.deepcopy(base))
    load_adapters(model, tmp_path / "theirs")
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert_close(out.logits, expected.logits, "logits")
    theirs = {n.replace(".default", ""): p.grad for n, p in plain.named_parameters() if p.grad is not None}
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}

    # The same files, bit for bit, which peft reads.
    save_adapters(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / folder / FILE) for folder in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(back(input_ids=ids).logits, plain(input_ids=ids).logits)

    with disable_adapters(model):
        assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, "logits without adapters")
    assert_close(model(input_ids=ids).logits, expected.logits, "logits with them again")
    merge_adapters(model)
    assert_close(model(input_ids=ids).logits, expected.logits, "merged")
    assert_close(unswap_moe(model)(input_ids=ids).logits, expected.logits, "merged and put back")


def test_several_adapters(tmp_path):
    base, ids = make_model("Qwen3-MoE"), token_ids(2, 9)
    configs = {"one": config_of("Qwen3-MoE"), "two": config_of("Qwen3-MoE", r=2, target_modules=["v_proj"])}
    logits, model = {}, swap_moe(copy.deepcopy(base))
    for seed, (name, config) in enumerate(configs.items()):
        plain = by_peft(base, config, seed)
        plain.save_pretrained(tmp_path / name)
        logits[name] = plain(input_ids=ids).logits
        load_adapters(model, tmp_path / name, name)
    for name in ("two", "one", "two"):
        set_adapter(model, name)
        assert_close(model(input_ids=ids).logits, logits[name], name)
        ours = {id(p) for target in adapters_of(model, name) for _, p in factors_of(model, target, name)}
        assert ours == {id(p) for p in model.parameters() if p.requires_grad}
    save_adapters(model, tmp_path / "again", "one")
    before, after = (load_file(tmp_path / folder / FILE) for folder in ("one", "again"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    merge_adapters(model, "one")
    assert_close(model(input_ids=ids).logits, logits["one"], "merged")
    with pytest.raises(ValueError, match="has no adapters 'two'; call add_adapters first"):
        set_adapter(model, "two")


def test_new_adapters_change_nothing_and_do_not_depend_on_anything_but_the_seed():
    models = [add_adapters(swap_moe(make_model("Mixtral")), config_of("Mixtral"), seed=seed) for seed in (0, 0, 1)]
    first, second, other = (dict(m.named_parameters()) for m in models)
    drawn = [name for name, p in first.items() if p.requires_grad and p.count_nonzero()]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    # Of linear layers, experts and routers, and no two alike.
    assert len(drawn) == 10
    assert len({first[name].sum().item() for name in drawn}) == 10
    ids = token_ids(2, 9)
    assert_close(models[0](input_ids=ids).logits, make_model("Mixtral")(input_ids=ids).logits, "logits")


def test_names_of_every_expert(tmp_path):
    """Files of transformers 4, where experts were linear layers: w1, w3 and w2 of Mixtral."""
    base, ids, r = make_model("Mixtral"), token_ids(2, 9), 2
    generator = torch.Generator().manual_seed(1)
    tensors, weights = {}, {name: p.detach().clone() for name, p in base.named_parameters()}
    for layer in range(2):
        for e in range(8):
            for old, (rows, columns) in {"w1": (24, 32), "w3": (24, 32), "w2": (32, 24)}.items():
                a, b = (torch.randn(*size, generator=generator) * 0.2 for size in ((r, columns), (rows, r)))
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.{old}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                weight = weights[f"model.layers.{layer}.mlp.experts.{'down_proj' if old == 'w2' else 'gate_up_proj'}"]
                first = 24 if old == "w3" else 0
                weight[e, first : first + rows] += 2.0 * b @ a
    peft.LoraConfig(r=r, lora_alpha=4, target_modules=["w1", "w2", "w3"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / FILE)
    model = swap_moe(copy.deepcopy(base))
    load_adapters(model, tmp_path)
    expected = torch.func.functional_call(base, weights, kwargs={"input_ids": ids}).logits
    assert_close(model(input_ids=ids).logits, expected, "logits")


@pytest.mark.parametrize("family", ["Mixtral", *(pytest.param(f, marks=pytest.mark.long) for f in OTHERS[2:4])])
def test_a_pair_of_tensors_for_each_expert(tmp_path, family):
    base, ids = make_model(family), token_ids(2, 9)
    plain = by_peft(base, config_of(family))
    plain.save_pretrained(tmp_path / "theirs")
    model = swap_moe(copy.deepcopy(base))
    load_adapters(model, tmp_path / "theirs")
    save_adapters(model, tmp_path / "each", each_expert=True)
    tensors = load_file(tmp_path / "each" / FILE)
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name]
    assert {tensor.ndim for tensor in experts} == {2}
    layers = sum(isinstance(module, moesaic.MoE) for module in model.modules())
    assert len(experts) == layers * 2 * 8 * 3  # a and b of three weights
    # peft puts them together again, and so do we. A factor of both gate and up projection is there twice.
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "each")
    assert_close(back(input_ids=ids).logits, plain(input_ids=ids).logits, "peft's logits")
    other = swap_moe(copy.deepcopy(base))
    load_adapters(other, tmp_path / "each")
    assert_close(other(input_ids=ids).logits, plain(input_ids=ids).logits, "our logits")


def test_a_family_without_a_tensor_for_each_expert(tmp_path):
    model = add_adapters(swap_moe(make_model("gpt-oss")), config_of("gpt-oss"))
    with pytest.raises(ValueError, match="GptOssForCausalLM has no tensor for each expert in its files; leave it out"):
        save_adapters(model, tmp_path, each_expert=True)


def test_loading_a_checkpoint_with_adapters(tmp_path):
    base, ids = make_model("Mixtral"), token_ids(2, 9)
    base.save_pretrained(tmp_path / "base")
    plain = by_peft(base, config_of("Mixtral"))
    plain.save_pretrained(tmp_path / "adapter")
    model = load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, "logits")
    merge_adapters(model)
    export_pretrained(model, tmp_path / "merged")
    new = load_pretrained(tmp_path / "base", adapter=config_of("Mixtral"))
    same = add_adapters(swap_moe(copy.deepcopy(base)), config_of("Mixtral"))
    found, expected = (dict(m.named_parameters()) for m in (new, same))
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    with pytest.raises(TypeError, match="adapter: expected a peft.LoraConfig or a folder, got int"):
        load_pretrained(tmp_path / "base", adapter=3)
    with pytest.raises(OSError, match=r"there is no .*adapter_config.json"):
        load_pretrained(tmp_path / "base", adapter=tmp_path / "base")


def test_loading_a_checkpoint_quantised(tmp_path):
    make_model("Mixtral").save_pretrained(tmp_path)
    # The blocks of nf4 run over the ends of rows of this model.
    loaded = load_pretrained(tmp_path, quantize="nf4").state_dict()
    expected = quantize_(load_pretrained(tmp_path), "nf4").state_dict()
    assert sum(name.endswith("w1.data") for name in expected) == 2
    assert all(torch.equal(loaded[name], t) for name, t in expected.items())
    with pytest.raises(ValueError, match="mxfp4 has blocks of 32 along the summed dim, which is 24 here"):
        load_pretrained(tmp_path, quantize="mxfp4")
    with torch.no_grad():
        (bad := make_model("Mixtral")).model.layers[1].mlp.experts.down_proj[3, 0, 0] = torch.inf
    bad.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.experts.w2', expert 3: .* not finite"):
        load_pretrained(tmp_path, quantize="int8")


def test_half_precision_has_adapters_in_fp32():
    model = add_adapters(swap_moe(make_model("Mixtral").bfloat16()), config_of("Mixtral"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(input_ids=(ids := token_ids(2, 9)), labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16


MISTAKES = {
    "target_parameters has 'model.layers.0.self_attn.q_proj.weight'": {
        "target_parameters": ["q_proj.weight"],
        "target_modules": [],
    },
    "modules_to_save=": {"modules_to_save": ["lm_head"]},
    "use_dora=True is not supported": {"use_dora": True},
    "'model.embed_tokens' is adapted as Embedding; choose linear layers": {"target_modules": ["embed_tokens"]},
    "config: lora_dropout: must be a number, at least 0 and below 1, got 1.5": {"lora_dropout": 1.5},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_cannot_be_adapted_is_named(message):
    model = swap_moe(make_model("Mixtral"))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_adapters(model, config_of("Mixtral", **MISTAKES[message]))
    assert list(model.state_dict()) == before


def test_other_mistakes(tmp_path):
    model = swap_moe(make_model("Mixtral"))
    with pytest.raises(TypeError, match="config: expected a peft.LoraConfig, got dict"):
        add_adapters(model, {"r": 3})
    with pytest.raises(ValueError, match="name: the model has no adapters 'x'; call add_adapters first"):
        save_adapters(model, tmp_path, "x")
    add_adapters(model, config_of("Mixtral"))
    with pytest.raises(ValueError, match="name: the model has adapters 'default' already"):
        add_adapters(model, config_of("Mixtral"))
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has adapters.*merge_adapters\(\)"):
        export_pretrained(model, tmp_path / "x")
    save_adapters(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FILE)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:1].clone()}, tmp_path / "a" / FILE)
    with pytest.raises(ValueError, match=r"does not fit the model: .* \[1, 32\] instead of \[3, 32\]"):
        load_adapters(model, tmp_path / "a")
    (tmp_path / "a" / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        load_adapters(model, tmp_path / "a")
