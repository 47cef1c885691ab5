"""The MoE blocks of transformers that a :class:`moesaic.MoE` can replace: one entry for all that compute the same.

A block with the code of one of these is replaced too, whatever its class is called: see :func:`family_of`. A block that
computes something that the layer does not is in no entry, and :data:`WHY_NOT` says why. Such models can still run on
our kernels (:func:`moesaic.integrations.transformers.register`).
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moesaic.integrations.transformers.activations import activation_name, own_gate_name
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
from moesaic.integrations.transformers.same_code import is_of_torch, same_code


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
    """The family of a transformers MoE block, or None.

    A class that the table does not name belongs to the family whose tensors it has and whose code it has: that of the
    block, and that of every part of it, such as the router, the experts and the shared expert.
    """
    if (family := FAMILIES.get(_place(type(module)))) is not None:
        return family
    if not isinstance(getattr(module, "experts", None), nn.Module):
        return None
    parts = {type(part) for name, part in module.named_modules() if name and not _is_known(part)}
    return _family_by_code(type(module), frozenset(parts), frozenset(module.state_dict()))


def _is_known(part: nn.Module) -> bool:
    """Whether a part of a block is checked elsewhere: layers of torch by their tensors, activations by their names."""
    return is_of_torch(type(part)) or activation_name(part) is not None


@functools.cache
def _family_by_code(block: type, parts: frozenset[type], tensors: frozenset[str]) -> Family | None:
    for place, family in FAMILIES.items():
        if not tensors <= {link.theirs for link in family.links}:
            continue
        path, name = place.split(":")
        try:
            module = importlib.import_module(f"transformers.models.{path}")
        except ImportError:  # of a later transformers
            continue
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
        if (original := vars(module).get(name)) is None or not same_code(block, original):
            continue
        if all(any(same_code(part, c) for c in classes) for part in parts):
            return family
    return None


def _place(block: type) -> str:
    return f"{block.__module__.removeprefix('transformers.models.')}:{block.__name__}"


def _softmax(block: Any) -> dict[str, Any]:
    """Mixtral and others like it. A softmax over the chosen logits only gives the same weights."""
    router = block.gate if hasattr(block, "gate") else block.router
    return {"top_k": router.top_k, "normalize_top_k": getattr(router, "norm_topk_prob", True)}


def _with_jitter(fields: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """For blocks that multiply their input by noise in training, before the router and the experts."""
    return lambda block: fields(block) | {"input_jitter": float(block.jitter_noise)}


def _softmax_and_gated_shared(block: Any) -> dict[str, Any]:
    return _softmax(block) | _shared_of(block, "shared_expert") | {"shared_gate": True}


def _softmax_and_shared(block: Any) -> dict[str, Any]:
    return _softmax(block) | _shared_of(block)


def _deepseek_v2(block: Any) -> dict[str, Any]:
    gate = block.gate
    fields = {
        "top_k": gate.top_k,
        "normalize_top_k": False,
        "route_scale": gate.routed_scaling_factor,
    } | _shared_of(block)
    if gate.topk_method == "greedy":
        return fields
    if gate.topk_method == "group_limited_greedy":
        return fields | {"num_groups": gate.num_group, "top_groups": gate.topk_group, "group_best": 1}
    raise ValueError(f"topk_method: got {gate.topk_method!r}; moesaic.MoE has only 'greedy' and 'group_limited_greedy'")


def _deepseek_v3_router(block: Any, scaled_by: Any = None) -> dict[str, Any]:
    """``scaled_by`` is the module that has the factor of the routing weights; None is the router."""
    gate = block.gate
    return {
        "top_k": gate.top_k,
        "score": "sigmoid",
        "score_bias": True,
        "normalize_top_k": gate.norm_topk_prob,
        "route_scale": (gate if scaled_by is None else scaled_by).routed_scaling_factor,
        "num_groups": gate.num_group,
        "top_groups": gate.topk_group,
    }


def _deepseek_v3(block: Any) -> dict[str, Any]:
    return _deepseek_v3_router(block) | _shared_of(block)


def _nemotron_h(block: Any) -> dict[str, Any]:
    # Blocks with a latent projection around the experts have tensors that no link takes.
    dense = block.shared_experts
    return _deepseek_v3_router(block) | {"gated": False, "shared_hidden_dim": dense.up_proj.out_features}


def _minimax_m2(block: Any) -> dict[str, Any]:
    return {"top_k": block.gate.top_k, "score": "sigmoid", "score_bias": True}


def _scaled_minimax_m2(block: Any) -> dict[str, Any]:
    fields = _minimax_m2(block) | {"route_scale": block.gate.router_scaling_factor}
    return fields | _shared_of(block) if hasattr(block, "shared_experts") else fields


def _mistral4(block: Any) -> dict[str, Any]:
    # Scores that it sets to 0 are not chosen either: softmax scores are above 0, unless they underflow.
    gate = block.gate
    return _shared_of(block) | {
        "top_k": gate.top_k,
        "normalize_top_k": getattr(gate, "norm_topk_prob", True),
        "route_scale": gate.routed_scaling_factor,
        "num_groups": gate.num_group,
        "top_groups": gate.topk_group,
    }


def _axk2(block: Any) -> dict[str, Any]:
    gate = block.gate
    if (gate.num_group or 1) > 1:
        raise ValueError(
            f"n_group: got {gate.num_group}; this router sets the scores of other groups to 0, which can still be the "
            "best where the bias is negative. moesaic.MoE leaves them out; set n_group to None"
        )
    return _deepseek_v3(block) | {"num_groups": 1, "top_groups": 1}


def _beam(block: Any) -> dict[str, Any]:
    # The factor is on the sum of the results, which is the same.
    return _deepseek_v3_router(block, scaled_by=block)


def _laguna(block: Any) -> dict[str, Any]:
    if block.gate.router_logit_softcapping > 0:
        raise ValueError(
            f"moe_router_logit_softcapping: got {block.gate.router_logit_softcapping}; moesaic.MoE takes logits as "
            "they are; set it to 0 in the model's config"
        )
    return _minimax_m2(block) | _shared_of(block) | {"route_scale": block.routed_scaling_factor}


def _afmoe(block: Any) -> dict[str, Any]:
    return _shared_of(block) | {
        "top_k": block.router.top_k,
        "score": "sigmoid",
        "score_bias": True,
        "route_scale": block.router.route_scale,
    }


def _lfm2(block: Any) -> dict[str, Any]:
    gate = block.gate
    return {
        "top_k": gate.top_k,
        "score": "sigmoid",
        "score_bias": block.use_expert_bias,
        "normalize_top_k": gate.norm_topk_prob,
        "normalize_eps": 1e-6,
        "route_scale": gate.routed_scaling_factor,
    }


def _flint(block: Any) -> dict[str, Any]:
    gate = block.gate
    return _shared_of(block, "shared_expert") | {
        "top_k": gate.top_k,
        "score": "sigmoid",
        "normalize_top_k": gate.norm_topk_prob,
    }


def _lara(block: Any) -> dict[str, Any]:
    return _softmax(block) | _shared_of(block, "shared_expert")


def _cohere2(block: Any) -> dict[str, Any]:
    # The best logits are those of the best scores, and a softmax over them gives the weights of a normalised one.
    gate, fields = block.gate, {}
    if block.num_shared_experts > 0:
        if (how := block.shared_expert_combination_strategy) != "sum":
            raise ValueError(f"shared_expert_combination_strategy: got {how!r}; moesaic.MoE has only 'sum'")
        fields = _shared_of(block)
    normalize = gate.norm_topk_prob if gate.expert_selection_fn == "sigmoid" else True
    return fields | {"top_k": gate.top_k, "score": gate.expert_selection_fn, "normalize_top_k": normalize}


def _jamba(block: Any) -> dict[str, Any]:
    return {"top_k": block.router.top_k, "normalize_top_k": False}


def _hunyuan(block: Any) -> dict[str, Any]:
    return {"top_k": block.gate.top_k} | _shared_of(block, "shared_mlp")


def _shared_of(block: Any, name: str = "shared_experts") -> dict[str, Any]:
    """The size of a shared expert; 0 where a block has none."""
    dense = getattr(block, name)
    return {"shared_hidden_dim": 0 if dense is None else dense.gate_proj.out_features}


def _ernie(block: Any) -> dict[str, Any]:
    # Weights are divided by their sum, or by this where it is larger. Ours is 1e-20. The sum of the best softmax scores
    # is far above both.
    if block.gate.norm_min > 1e-6:
        raise ValueError(f"moe_norm_min: {block.gate.norm_min} changes routing weights; moesaic.MoE takes at most 1e-6")
    return _shared_of(block) | {"top_k": block.gate.top_k, "score_bias": True}


def _llama4(block: Any) -> dict[str, Any]:
    return _shared_of(block, "shared_expert") | {
        "top_k": block.router.top_k,
        "score": "sigmoid",
        "normalize_top_k": False,
        "weigh_inputs": True,
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


_SHARED = shared("shared_experts")
_GATE = same("gate.weight", "router.weight")
_ROUTER = same("router.weight", "router.weight")
_PLAIN = (*EXPERTS, _GATE)
_GATED_SHARED = (*_PLAIN, *shared("shared_expert"), same("shared_expert_gate.weight", "shared.gate.weight"))
_DEEPSEEK_V2 = (*_PLAIN, *_SHARED)
_SCORE_BIAS = same("gate.e_score_correction_bias", "router.bias")
_DEEPSEEK_V3 = (*_DEEPSEEK_V2, _SCORE_BIAS)

_BIAS_ON_BLOCK = same("e_score_correction_bias", "router.bias")

FAMILIES: dict[str, Family] = {
    "afmoe.modeling_afmoe:AfmoeSparseMoeBlock": Family(
        (*EXPERTS, same("router.gate.weight", "router.weight"), same("expert_bias", "router.bias"), *_SHARED), _afmoe
    ),
    "aria.modeling_aria:AriaTextMoELayer": Family((*TRANSPOSED_EXPERTS, _ROUTER, *_SHARED), _softmax_and_shared),
    "axk2.modeling_axk2:AXK2MoE": Family(_DEEPSEEK_V3, _axk2),
    "beam.modeling_beam:BeamMoE": Family((*_PLAIN, _SCORE_BIAS), _beam),
    "cohere2_moe.modeling_cohere2_moe:Cohere2MoeSparseMoeBlock": Family((*_PLAIN, *_SHARED), _cohere2),
    "deepseek_v2.modeling_deepseek_v2:DeepseekV2Moe": Family(_DEEPSEEK_V2, _deepseek_v2),
    "deepseek_v3.modeling_deepseek_v3:DeepseekV3MoE": Family(_DEEPSEEK_V3, _deepseek_v3),
    "dots3_note.modeling_dots3_note:Dots3NoteVisionMoE": Family((*_PLAIN, _BIAS_ON_BLOCK), _scaled_minimax_m2),
    "ernie4_5_moe.modeling_ernie4_5_moe:Ernie4_5_MoeSparseMoeBlock": Family(
        (*_DEEPSEEK_V2, row("gate.moe_statics.e_score_correction_bias", "router.bias")), _ernie
    ),
    "flint.modeling_flint:FlintSparseMoeBlock": Family((*_PLAIN, *shared("shared_expert")), _flint),
    "gpt_oss.modeling_gpt_oss:GptOssMLP": Family(
        (*INTERLEAVED_EXPERTS, _ROUTER, same("router.bias", "router.logit_bias")), _gpt_oss, returns_pair=True
    ),
    "granitemoe.modeling_granitemoe:GraniteMoeMoE": Family((*EXPERTS, _ROUTER), _softmax),
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe:HunYuanMoEV1Moe": Family(
        (*EXPERTS, same("gate.wg.weight", "router.weight"), *shared("shared_mlp")), _hunyuan
    ),
    "hy_v3.modeling_hy_v3:HYV3MoE": Family((*_PLAIN, _BIAS_ON_BLOCK, *_SHARED), _scaled_minimax_m2),
    "jamba.modeling_jamba:JambaSparseMoeBlock": Family((*EXPERTS, _ROUTER), _jamba),
    "laguna.modeling_laguna:LagunaSparseMoeBlock": Family(_DEEPSEEK_V3, _laguna),
    "lara_mini.modeling_lara_mini:LaraMiniSparseMoeBlock": Family((*_PLAIN, *shared("shared_expert")), _lara),
    "lfm2_moe.modeling_lfm2_moe:Lfm2MoeSparseMoeBlock": Family((*_PLAIN, same("expert_bias", "router.bias")), _lfm2),
    "llama4.modeling_llama4:Llama4TextMoe": Family(
        (*TRANSPOSED_EXPERTS, _ROUTER, *shared("shared_expert")), _llama4, returns_pair=True
    ),
    "mimo_v2_flash.modeling_mimo_v2_flash:MiMoV2FlashMoE": Family((*_PLAIN, _SCORE_BIAS), _deepseek_v3_router),
    "minimax_m2.modeling_minimax_m2:MiniMaxM2SparseMoeBlock": Family(
        (*_PLAIN, _BIAS_ON_BLOCK), _with_jitter(_minimax_m2)
    ),
    "mistral4.modeling_mistral4:Mistral4MoE": Family(_DEEPSEEK_V2, _mistral4),
    "mistral_large4.modeling_mistral_large4:MistralLarge4TextMoE": Family(_DEEPSEEK_V2, _mistral4),
    "mixtral.modeling_mixtral:MixtralSparseMoeBlock": Family(_PLAIN, _with_jitter(_softmax)),
    "nemotron_h.modeling_nemotron_h:NemotronHMoE": Family(
        (*UNGATED_EXPERTS, _GATE, _SCORE_BIAS, *ungated_shared("shared_experts")), _nemotron_h
    ),
    "olmoe.modeling_olmoe:OlmoeSparseMoeBlock": Family(_PLAIN, _softmax),
    "qwen2_moe.modeling_qwen2_moe:Qwen2MoeSparseMoeBlock": Family(_GATED_SHARED, _softmax_and_gated_shared),
    "qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeSparseMoeBlock": Family(_GATED_SHARED, _softmax_and_gated_shared),
    "qwen3_moe.modeling_qwen3_moe:Qwen3MoeSparseMoeBlock": Family(_PLAIN, _softmax),
    "qwen3_vl_moe.modeling_qwen3_vl_moe:Qwen3VLMoeTextSparseMoeBlock": Family(_PLAIN, _softmax),
}

# The folder of a model in transformers -> what its block computes that the layer does not.
WHY_NOT: dict[str, str] = {
    "axk1": "a norm follows the sum of experts and shared expert",
    "deepseek_v4": "its experts clamp gate and up projections, and its first layers choose experts by token ids",
    "diffusion_gemma": "its router sees other numbers than its experts do, and has a scale for each expert",
    "ernie4_5_vl_moe": "text and images have experts and routers of their own in one block",
    "gemma4": "its router sees other numbers than its experts do, and has a scale for each expert",
    "glm5_next": "its experts clamp gate and up projections",
    "hy_v4": "its experts clamp gate and up projections",
    "hy_v4_vl": "its experts clamp gate and up projections",
    "inkling": "its router weighs the shared experts too",
    "inkling2": "its experts have an activation of gate and up projection together",
    "inkling2_loop": "its experts have an activation of gate and up projection together",
    "kolibri1": "its bias is on logits, before the sigmoid",
    "minimax_m3_vl": "its experts clamp gate and up projections, which do not alternate as in gpt-oss",
    "muse_spark": "projections and norms are around its experts",
    "openai_privacy_filter": "its gate and up projections do not alternate as in gpt-oss",
    "phimoe": "its router, SparseMixer, is random in training",
    "zaya": "its router has a state from layer to layer, and tokens can skip the experts",
}


def why_not(block: type) -> str | None:
    """Why the layer cannot replace a block of a class of transformers, where that is known."""
    return WHY_NOT.get(block.__module__.removeprefix("transformers.models.").partition(".")[0])
