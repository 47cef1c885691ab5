"""A tiny random model of every family, and how the results of two models are taken and compared."""

import copy
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from moesaic.integrations.transformers import to_transformers_state_dict

VOCAB = 61
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "experts_implementation": "eager",
}
_MLA = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LOCAL = {"num_local_experts": 8}
_QWEN = {"num_experts": 8, "moe_intermediate_size": 12}

# Name in the documentation -> (name of the classes, what its config has on top of the common sizes).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", _LOCAL),
    "Qwen2-MoE": ("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 20}),
    "Qwen3-MoE": ("Qwen3Moe", {**_QWEN, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "OLMoE": ("Olmoe", {"num_experts": 8}),
    "DeepSeek-V2": ("DeepseekV2", {**_MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5}),
    "DeepSeek-V3": ("DeepseekV3", _MLA),
    "GLM-4-MoE": ("Glm4Moe", {**_MLA, "head_dim": 8, "num_key_value_heads": 2}),
    "gpt-oss": ("GptOss", {**_LOCAL, "layer_types": ["sliding_attention", "full_attention"]}),
    "Granite-MoE": ("GraniteMoe", _LOCAL),
    "Phi-MoE": ("Phimoe", {**_LOCAL, "num_experts_per_tok": 2}),
    "Llama-4": (
        "Llama4",
        {**_LOCAL, "intermediate_size_mlp": 24, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1},
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        {
            **_QWEN,
            "shared_expert_intermediate_size": 20,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "MiniMax": ("MiniMax", _LOCAL),
    "MiniMax-M2": ("MiniMaxM2", _LOCAL),
    "Ernie-4.5-MoE": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 12,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
    ),
    "Aria": ("AriaText", {"moe_num_experts": 8, "moe_topk": 3}),
    "Nemotron-H": ("NemotronH", {"n_routed_experts": 8}),
}


def make_model(family: str, **changes: Any) -> Any:
    """A causal language model of the family with spread-out random weights, biases too, in eval mode."""
    torch.manual_seed(0)
    stem, sizes = FAMILIES[family]
    config_class = getattr(transformers, f"{stem}TextConfig" if family == "Llama-4" else f"{stem}Config")
    model = getattr(transformers, f"{stem}ForCausalLM")(config_class(**(_COMMON | sizes | changes)))
    return spread(model).eval()


def spread(model: Any) -> Any:
    """Give a model spread-out random weights, biases too. Returns it."""
    generator = torch.Generator().manual_seed(0)
    # Other buffers are computed from the config, as MiniMax's decays, and would be wrong.
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if "bias" in name]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            # Large enough for experts and tokens to differ, and for no bias to be zero.
            if tensor.ndim > 1 or "bias" in name:
                tensor.normal_(std=0.2, generator=generator)
    return model


def make_published_llama4() -> Any:
    """A Llama-4 as it is published: the language model beside a vision model."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28}
    config = transformers.Llama4Config(text_config=_COMMON | FAMILIES["Llama-4"][1], vision_config=sizes | vision)
    return transformers.Llama4ForConditionalGeneration(config).eval()


class Results(NamedTuple):
    """What a model computes: `gradients` by parameter name, `routes` the sorted expert ids of each MoE layer."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    routes: list[Tensor]


def token_ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def results_of(model: Any) -> Results:
    routes: list[Tensor] = []
    hooks = [m.register_forward_hook(_recorder(routes)) for m in model.modules() if _is_router(m)]
    model.zero_grad()
    ids = token_ids(2, 17)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Results(out.logits.detach(), out.loss.detach(), gradients, routes)


def _is_router(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith("router")


def _recorder(routes: list[Tensor]) -> Any:
    def record(router: Any, args: Any, output: Any) -> None:
        ids = [t for t in output if isinstance(t, Tensor) and not t.is_floating_point()]
        # Llama-4's gives back scores, -inf before a sigmoid where an expert is not chosen.
        routes.append((ids[0] if ids else output[0].topk(router.top_k).indices).sort(-1).values)

    return record


def original_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of a model with swapped layers, under the original names: they go the way of the weights."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for mine, its in zip(holder.parameters(), model.parameters(), strict=True):
            mine.copy_(its.grad)
    return to_transformers_state_dict(holder)


def assert_close(actual: Tensor, expected: Tensor, name: str, rtol: float = 1e-5) -> None:
    """Equal within fp32 rounding: of the largest element, for one element may be a difference of large ones."""
    atol = rtol * float(expected.detach().abs().amax())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda message: f"{name}: {message}")


def assert_equal_results(actual: Results, expected: Results) -> None:
    assert len(actual.routes) == len(expected.routes) > 0
    for mine, theirs in zip(actual.routes, expected.routes, strict=True):
        assert torch.equal(mine, theirs)
    assert_close(actual.logits, expected.logits, "logits")
    assert_close(actual.loss, expected.loss, "loss", rtol=1e-6)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(actual.gradients[name], gradient, name)
