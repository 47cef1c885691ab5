"""The MoE blocks of transformers that a :class:`moesaic.MoE` can replace: one entry for each family.

A family is not in the table if its block computes something that the layer does not. Such models can still run on our
kernels (:func:`moesaic.integrations.transformers.register`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moesaic.integrations.transformers.activations import own_gate_name
from moesaic.integrations.transformers.links import (
    EXPERTS,
    INTERLEAVED_EXPERTS,
    TRANSPOSED_EXPERTS,
    UNGATED_EXPERTS,
    Link,
    row,
    same,
    shared,
    ungated_shared,
)


@dataclass(frozen=True)
class Family:
    """How a block of transformers becomes a layer of ours.

    Attributes:
        links: its tensors. A block need not have all of them, but it must not have others.
        fields: takes a block and returns fields of :class:`moesaic.MoEConfig`. The sizes of the experts are not among
            them, nor is an activation that the experts have as a module.
        returns_pair: whether the block also returns router results, which the decoder layer drops.
    """

    links: tuple[Link, ...]
    fields: Callable[[Any], dict[str, Any]]
    returns_pair: bool = False


def family_of(module: nn.Module) -> Family | None:
    """The family of a transformers MoE block, or None. The type has to match exactly: a subclass may differ."""
    return FAMILIES.get(_place(type(module)))


def _place(block: type) -> str:
    return f"{block.__module__.removeprefix('transformers.models.')}:{block.__name__}"


def _softmax(block: Any) -> dict[str, Any]:
    """Mixtral and others like it. A softmax over the chosen logits only gives the same weights."""
    router = block.gate if hasattr(block, "gate") else block.router
    return {"top_k": router.top_k, "normalize_top_k": getattr(router, "norm_topk_prob", True)}


def _without_jitter(fields: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    def checked(block: Any) -> dict[str, Any]:
        if block.jitter_noise > 0:
            raise ValueError(
                f"router_jitter_noise: {block.jitter_noise} multiplies tokens by noise in training, but moesaic.MoE "
                "cannot; set it to 0 in the model's config"
            )
        return fields(block)

    return checked


def _softmax_and_gated_shared(block: Any) -> dict[str, Any]:
    return _softmax(block) | {"shared_hidden_dim": block.shared_expert.gate_proj.out_features, "shared_gate": True}


def _softmax_and_shared(block: Any) -> dict[str, Any]:
    return _softmax(block) | {"shared_hidden_dim": block.shared_experts.gate_proj.out_features}


def _deepseek_v2(block: Any) -> dict[str, Any]:
    gate = block.gate
    fields = {
        "top_k": gate.top_k,
        "normalize_top_k": False,
        "route_scale": gate.routed_scaling_factor,
        "shared_hidden_dim": block.shared_experts.gate_proj.out_features,
    }
    if gate.topk_method == "greedy":
        return fields
    if gate.topk_method == "group_limited_greedy":
        return fields | {"num_groups": gate.num_group, "top_groups": gate.topk_group, "group_best": 1}
    raise ValueError(f"topk_method: got {gate.topk_method!r}; moesaic.MoE has only 'greedy' and 'group_limited_greedy'")


def _deepseek_v3_router(block: Any) -> dict[str, Any]:
    gate = block.gate
    return {
        "top_k": gate.top_k,
        "score": "sigmoid",
        "score_bias": True,
        "normalize_top_k": gate.norm_topk_prob,
        "route_scale": gate.routed_scaling_factor,
        "num_groups": gate.num_group,
        "top_groups": gate.topk_group,
    }


def _deepseek_v3(block: Any) -> dict[str, Any]:
    return _deepseek_v3_router(block) | {"shared_hidden_dim": block.shared_experts.gate_proj.out_features}


def _nemotron_h(block: Any) -> dict[str, Any]:
    # Blocks with a latent projection around the experts have tensors that no link takes.
    dense = block.shared_experts
    return _deepseek_v3_router(block) | {"gated": False, "shared_hidden_dim": dense.up_proj.out_features}


def _minimax_m2(block: Any) -> dict[str, Any]:
    return {"top_k": block.gate.top_k, "score": "sigmoid", "score_bias": True}


def _ernie(block: Any) -> dict[str, Any]:
    # Weights are divided by their sum, or by this where it is larger. Ours is 1e-20. The sum of the best softmax scores
    # is far above both.
    if block.gate.norm_min > 1e-6:
        raise ValueError(f"moe_norm_min: {block.gate.norm_min} changes routing weights; moesaic.MoE takes at most 1e-6")
    dense = block.shared_experts
    return {
        "top_k": block.gate.top_k,
        "score_bias": True,
        "shared_hidden_dim": 0 if dense is None else dense.gate_proj.out_features,
    }


def _llama4(block: Any) -> dict[str, Any]:
    return {
        "top_k": block.router.top_k,
        "score": "sigmoid",
        "normalize_top_k": False,
        "weigh_inputs": True,
        "shared_hidden_dim": block.shared_expert.gate_proj.out_features,
    }


def _gpt_oss(block: Any) -> dict[str, Any]:
    experts = block.experts
    if type(experts).__name__ != "GptOssExperts":
        raise ValueError(
            f"experts: {type(experts).__name__} does not have plain tensors; load the model with "
            "quantization_config=Mxfp4Config(dequantize=True)"
        )
    activation = own_gate_name(experts)
    if activation is None:
        raise ValueError(
            f"swiglu_alpha, swiglu_limit: got {experts.alpha} and {experts.limit}; "
            "moesaic.MoE supports only 1.702 and 7"
        )
    # Its softmax is over the chosen logits only, which gives the same weights.
    return {"top_k": block.router.top_k, "activation": activation, "logit_bias": True, "expert_biases": True}


_GATE = same("gate.weight", "router.weight")
_ROUTER = same("router.weight", "router.weight")
_PLAIN = (*EXPERTS, _GATE)
_GATED_SHARED = (*_PLAIN, *shared("shared_expert"), same("shared_expert_gate.weight", "shared.gate.weight"))
_DEEPSEEK_V2 = (*_PLAIN, *shared("shared_experts"))
_SCORE_BIAS = same("gate.e_score_correction_bias", "router.bias")
_DEEPSEEK_V3 = (*_DEEPSEEK_V2, _SCORE_BIAS)

FAMILIES: dict[str, Family] = {
    "aria.modeling_aria:AriaTextMoELayer": Family(
        (*TRANSPOSED_EXPERTS, _ROUTER, *shared("shared_experts")), _softmax_and_shared
    ),
    "deepseek_v2.modeling_deepseek_v2:DeepseekV2Moe": Family(_DEEPSEEK_V2, _deepseek_v2),
    "deepseek_v3.modeling_deepseek_v3:DeepseekV3MoE": Family(_DEEPSEEK_V3, _deepseek_v3),
    "ernie4_5_moe.modeling_ernie4_5_moe:Ernie4_5_MoeSparseMoeBlock": Family(
        (*_DEEPSEEK_V2, row("gate.moe_statics.e_score_correction_bias", "router.bias")), _ernie
    ),
    "glm4_moe.modeling_glm4_moe:Glm4MoeMoE": Family(_DEEPSEEK_V3, _deepseek_v3),
    "gpt_oss.modeling_gpt_oss:GptOssMLP": Family(
        (*INTERLEAVED_EXPERTS, _ROUTER, same("router.bias", "router.logit_bias")), _gpt_oss, returns_pair=True
    ),
    "granitemoe.modeling_granitemoe:GraniteMoeMoE": Family((*EXPERTS, _ROUTER), _softmax),
    "llama4.modeling_llama4:Llama4TextMoe": Family(
        (*TRANSPOSED_EXPERTS, _ROUTER, *shared("shared_expert")), _llama4, returns_pair=True
    ),
    "minimax.modeling_minimax:MiniMaxSparseMoeBlock": Family(_PLAIN, _without_jitter(_softmax)),
    "minimax_m2.modeling_minimax_m2:MiniMaxM2SparseMoeBlock": Family(
        (*_PLAIN, same("e_score_correction_bias", "router.bias")), _without_jitter(_minimax_m2)
    ),
    "mixtral.modeling_mixtral:MixtralSparseMoeBlock": Family(_PLAIN, _without_jitter(_softmax)),
    "nemotron_h.modeling_nemotron_h:NemotronHMoE": Family(
        (*UNGATED_EXPERTS, _GATE, _SCORE_BIAS, *ungated_shared("shared_experts")), _nemotron_h
    ),
    "olmoe.modeling_olmoe:OlmoeSparseMoeBlock": Family(_PLAIN, _softmax),
    "qwen2_moe.modeling_qwen2_moe:Qwen2MoeSparseMoeBlock": Family(_GATED_SHARED, _softmax_and_gated_shared),
    "qwen3_moe.modeling_qwen3_moe:Qwen3MoeSparseMoeBlock": Family(_PLAIN, _softmax),
    "qwen3_next.modeling_qwen3_next:Qwen3NextSparseMoeBlock": Family(_GATED_SHARED, _softmax_and_gated_shared),
}
