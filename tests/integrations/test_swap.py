"""Depth 2: `swap_moe`, and everything back with `unswap_moe`."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.activations import GELUTanh

import moesaic
from moesaic.integrations.transformers import (
    export_pretrained,
    load_pretrained,
    swap_moe,
    to_transformers_state_dict,
    unswap_moe,
)
from moesaic.layers import expert_load, update_expert_bias
from tests.integrations.families import (
    FAMILIES,
    assert_equal_results,
    make_model,
    original_gradients,
    results_of,
    token_ids,
)

SWAPPED = [family for family in FAMILIES if family != "Phi-MoE"]
each_family = pytest.mark.parametrize("family", SWAPPED)


def snapshot(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """All there is to say about a model's tensors."""
    tensors = model.state_dict(keep_vars=True)
    return {n: (t.dtype, t.shape, t.stride(), type(t), t.requires_grad, t.tolist()) for n, t in tensors.items()}


def layers_of(model: nn.Module) -> list[moesaic.MoE]:
    return [module for module in model.modules() if isinstance(module, moesaic.MoE)]


@each_family
@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
def test_a_model_computes_what_it_did(family, mode):
    check_results(
        make_model(family, attention_dropout=0.0).train(mode != "eval"), checkpointing=mode == "checkpointing"
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Aria", {"hidden_act": "gelu"}),
        ("DeepSeek-V2", {"topk_method": "greedy"}),
        ("DeepSeek-V3", {"norm_topk_prob": False, "routed_scaling_factor": 1.7}),
        ("Ernie-4.5-MoE", {"moe_num_shared_experts": 0}),
        ("Llama-4", {"num_experts_per_tok": 1}),
        ("OLMoE", {"hidden_act": "gelu_pytorch_tanh", "norm_topk_prob": True}),
        ("Qwen3-MoE", {"norm_topk_prob": False, "tie_word_embeddings": True, "mlp_only_layers": []}),
    ],
)
def test_other_settings(family, changes):
    check_results(make_model(family, **changes))


def shared_experts_of(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith((".shared_expert", ".shared_experts"))]


WITH_SHARED = [family for family in SWAPPED if shared_experts_of(make_model(family))]


@pytest.mark.parametrize("family", WITH_SHARED)
def test_the_shared_expert_has_an_activation_of_its_own(family):
    model = make_model(family)
    for shared in shared_experts_of(model):
        setattr(shared, "act_fn" if hasattr(shared, "act_fn") else "activation_fn", GELUTanh())
    check_results(model)
    strange = make_model(family)
    for shared in shared_experts_of(strange):
        setattr(shared, "act_fn" if hasattr(shared, "act_fn") else "activation_fn", nn.Softsign())
    with pytest.raises(ValueError, match="hidden_act: .* activation Softsign of the shared expert"):
        swap_moe(strange)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_shared_expert_at_all(tmp_path):
    model = make_model("DeepSeek-V3", n_shared_experts=0)
    before, logits = snapshot(model), model(input_ids=token_ids(2, 9)).logits
    model.save_pretrained(tmp_path / "theirs")
    export_pretrained(swap_moe(model), tmp_path / "ours")
    assert layers_of(model)[0].shared is None
    assert (
        load_file(tmp_path / "ours/model.safetensors").keys() == load_file(tmp_path / "theirs/model.safetensors").keys()
    )
    for swapped in (model, load_pretrained(tmp_path / "theirs")):
        torch.testing.assert_close(swapped(input_ids=token_ids(2, 9)).logits, logits, rtol=1e-4, atol=1e-5)
    assert snapshot(unswap_moe(model)) == before


def check_results(model: nn.Module, checkpointing: bool = False) -> None:
    expected = results_of(model)
    num_routers = len(expected.routes)
    swap_moe(model)
    assert len(layers_of(model)) == num_routers
    if checkpointing:
        model.activation_checkpointing_enable()
    actual = results_of(model)
    gradients = original_gradients(model)
    gradients = {name: gradients[name] for name in expected.gradients}
    # Recomputed layers route once more.
    assert_equal_results(actual._replace(gradients=gradients, routes=actual.routes[:num_routers]), expected)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(family, dtype):
    model = make_model(family).to(dtype)
    model.get_input_embeddings().requires_grad_(False)
    before, logits = snapshot(model), model(input_ids=token_ids(2, 9)).logits
    swap_moe(model)
    assert not any(module.training for module in model.modules())
    assert snapshot(model).keys() != before.keys()
    theirs = to_transformers_state_dict(model)
    assert theirs.keys() == before.keys()
    assert unswap_moe(model) is model
    assert snapshot(model) == before
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
        assert theirs[name].dtype == tensor.dtype, name
    assert torch.equal(model(input_ids=token_ids(2, 9)).logits, logits)
    assert not layers_of(model)
    assert "save_pretrained" not in vars(model)


@each_family
def test_what_is_trained_comes_back(family):
    """Every tensor of a layer is another afterwards, and the model computes what the layers did."""
    model = make_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap_moe(model)
    with torch.no_grad():
        for layer in layers_of(model):
            for tensor in layer.state_dict().values():
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) / 8)
    model.train()
    blocks = [name for name, module in model.named_modules() if isinstance(module, moesaic.MoE)]
    logits = model(input_ids=token_ids(2, 9)).logits
    unswap_moe(model)
    assert all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        is_inside = any(name.startswith(f"{block}.") for block in blocks)
        assert (tensor == before[name]).all() == (not is_inside), name
    torch.testing.assert_close(model(input_ids=token_ids(2, 9)).logits, logits, rtol=1e-5, atol=1e-5)


@each_family
def test_saved_with_layers_loaded_without(tmp_path, family):
    model = make_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap_moe(model).save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == before.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@each_family
def test_original_names_are_taken(family):
    model, other = make_model(family), make_model(family)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    theirs = other.state_dict()
    swap_moe(model)
    model.load_state_dict(theirs)
    assert all(torch.equal(mine, theirs[name]) for name, mine in to_transformers_state_dict(model).items())
    swap_moe(other)
    model.load_state_dict(other.state_dict())
    lacking = {name: tensor for name, tensor in theirs.items() if "down_proj" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*experts.w2"):
        model.load_state_dict(lacking)


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation(mode):
    model = make_model("DeepSeek-V3")
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, **mode}
    expected = model.generate(token_ids(2, 5), **arguments)
    assert torch.equal(swap_moe(model).generate(token_ids(2, 5), **arguments), expected)


def test_what_a_layer_adds():
    model = swap_moe(make_model("DeepSeek-V3"), aux_loss_coef=0.1, z_loss_coef=0.01, bias_update_speed=0.5).train()
    with moesaic.balance_losses() as losses:
        model(input_ids=token_ids(2, 9))
    assert len(losses) == 2 * len(layers_of(model)) > 0
    assert all(load.sum() == 2 * 9 * 3 for load in expert_load(model).values())
    bias = layers_of(model)[0].router.bias.clone()
    update_expert_bias(model)
    assert not torch.equal(layers_of(model)[0].router.bias, bias)


def test_frozen_parts_stay_frozen():
    model = make_model("Qwen2-MoE").requires_grad_(False)
    model.model.layers[0].mlp.shared_expert_gate.requires_grad_(True)
    before = snapshot(model)
    swap_moe(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.layers.0.mlp.shared.gate.weight"]
    assert snapshot(unswap_moe(model)) == before


def test_a_copy_goes_back_by_itself():
    model = swap_moe(make_model("Mixtral"))
    names = to_transformers_state_dict(model).keys()
    other = unswap_moe(copy.deepcopy(model))
    assert other.state_dict().keys() == names
    assert layers_of(model)


def test_weights_are_not_held_twice():
    model = make_model("Mixtral")
    swap_moe(model)
    layer = layers_of(model)[0]
    assert all(tensor.is_meta for tensor in layer.origin.block.state_dict().values())
    assert set(layer.state_dict()) == {"router.weight", "experts.w1", "experts.w2", "experts.w3"}


def refusal(model: nn.Module, message: str, **arguments: object) -> None:
    """Refused, and nothing has changed."""
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        swap_moe(model, **arguments)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert "save_pretrained" not in vars(model)


def test_models_that_the_layer_cannot_stand_in_for():
    phi = make_model("Phi-MoE")
    refusal(phi, r"cannot replace the blocks with PhimoeExperts in \w+: its router, SparseMixer, .*; use register\(\)")
    quantized = make_model("gpt-oss")
    quantized.model.layers[1].mlp.experts = nn.Linear(3, 3)
    refusal(quantized, r"'model.layers.1.mlp' .*: experts: Linear does not have plain tensors; .*dequantize=True")
    refusal(make_model("Qwen3-MoE", mlp_only_layers=[0, 1]), "Qwen3MoeForCausalLM has no MoE block; moesaic")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Mixtral", {"router_jitter_noise": 1.5}, "'model.layers.0.mlp' .*: input_jitter: must be .* than 1, got 1.5"),
        ("Nemotron-H", {"moe_latent_size": 16}, r"moesaic.MoE has no place for \['fc1_latent_proj.weight', "),
        ("OLMoE", {"hidden_act": "mish"}, "hidden_act: moesaic.MoE does not have the activation Mish"),
        ("Ernie-4.5-MoE", {"use_bias": True}, "no place for .*'shared_experts.down_proj.bias'"),
        ("Ernie-4.5-MoE", {"moe_norm_min": 0.1}, "moe_norm_min: 0.1 changes routing weights"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_alpha, swiglu_limit: got 1.702 and 5.0; .* only 1.702 and 7"),
        ("DeepSeek-V2", {"mlp_bias": True}, "no place for .*'shared_experts.down_proj.bias'"),
    ],
)
def test_configurations_that_the_layer_does_not_have(family, changes, message):
    refusal(make_model(family, **changes), message)


@pytest.mark.parametrize("family", ["Mixtral", "MiniMax-M2"])
def test_router_jitter_is_that_of_transformers(family):
    """The same numbers from the same seed, in training alone."""
    plain = make_model(family, router_jitter_noise=0.3, attention_dropout=0.0)
    ours = swap_moe(copy.deepcopy(plain))
    for training in (False, True):
        outputs = []
        for model in (plain, ours):
            torch.manual_seed(5)
            outputs.append(model.train(training)(input_ids=token_ids(2, 9)).logits)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
        calm = make_model(family)(input_ids=token_ids(2, 9)).logits
        assert torch.allclose(outputs[1], calm, rtol=1e-3, atol=1e-3) == (not training)


def test_a_model_on_the_meta_device_stays_there():
    with torch.device("meta"):
        model = swap_moe(make_model("DeepSeek-V3"))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert isinstance(model.model.layers[1].mlp, moesaic.MoE)


def test_states_in_which_a_model_cannot_be_swapped():
    refusal(make_model("Mixtral"), "bias_update_speed: got 0.1, but the router has no bias", bias_update_speed=0.1)
    model = make_model("DeepSeek-V3").double()
    model.model.layers[1].mlp.gate.e_score_correction_bias.fill_(1 / 3)
    refusal(model, "'gate.e_score_correction_bias' is not exact in fp32")
    del model.model.layers[1].mlp.gate.e_score_correction_bias
    refusal(model, r"the block has no tensor for \['router.bias'\] of moesaic.MoE")
    with pytest.raises(ValueError, match="MixtralForCausalLM has no layer that swap_moe made"):
        unswap_moe(make_model("Mixtral"))


def test_sharded_models_are_refused(ranks):
    ranks(_refuse_sharded, 1)


def _refuse_sharded() -> None:
    mesh = init_device_mesh("cpu", (1,))

    def shard(module: nn.Module, name: str) -> Tensor:
        return nn.Parameter(distribute_tensor(getattr(module, name).detach(), mesh, [Shard(0)]))

    model = make_model("Mixtral")
    model.lm_head.weight = shard(model.lm_head, "weight")
    with pytest.raises(ValueError, match="'lm_head.weight' is a DTensor; call swap_moe before you shard the model"):
        swap_moe(model)
    model = swap_moe(make_model("Mixtral"))
    experts = layers_of(model)[0].experts
    experts.w1 = shard(experts, "w1")
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp' is parallelized; use export_pretrained\(\) to write"):
        unswap_moe(model)
    with pytest.raises(ValueError, match=r"experts.w1' is a DTensor; call export_pretrained\(model, path\) on every"):
        model.save_pretrained("never-written")
