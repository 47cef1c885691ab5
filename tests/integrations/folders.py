"""A tiny random model of every folder of transformers whose experts use its interface, and what they all have.

The families of :mod:`tests.integrations.families` are the models of their folders; the others are here.
"""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from tests.integrations.families import _COMMON, _MLA, VOCAB, make_model, spread, token_ids

# The folders that have a name in the documentation, by that name.
NAMED = {
    "aria": "Aria",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "ernie4_5_moe": "Ernie-4.5-MoE",
    "glm4_moe": "GLM-4-MoE",
    "gpt_oss": "gpt-oss",
    "granitemoe": "Granite-MoE",
    "minimax": "MiniMax",
    "minimax_m2": "MiniMax-M2",
    "mixtral": "Mixtral",
    "nemotron_h": "Nemotron-H",
    "olmoe": "OLMoE",
    "phimoe": "Phi-MoE",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next",
}

# Sizes under all names that configs have for them. A config gets those that it has.
_SIZES = {
    **{name: value for name, value in _COMMON.items() if name != "experts_implementation"},
    **dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("moe_k", "moe_topk", "top_k_experts"), 3),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 20),
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {
    name: _MLA[name]
    for name in (
        "num_key_value_heads",
        "head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
    )
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LLAMA_4_SCALING = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_MROPE = {**_ROPE, "mrope_section": [1, 1, 2]}
_SMALL = {"index_head_dim": 8, "index_n_heads": 2, "linear_head_dim": 8, "linear_num_heads": 2}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


# Folders that transformers 5.23 does not have yet.
SINCE_5_24 = ["hy_v4_vl", "inkling2_loop", "lara_mini"]


class Row(NamedTuple):
    """The class of a model, and what its config has on top of the common sizes."""

    model: str
    changes: dict[str, Any] = {}  # noqa: RUF012, never written to


OTHERS: dict[str, Row] = {
    "afmoe": Row("AfmoeForCausalLM"),
    "axk1": Row("AXK1ForCausalLM", _LATENT),
    "axk2": Row("AXK2ForCausalLM", {**_LATENT, "n_group": None, "topk_group": None}),
    "bailing_hybrid": Row("BailingHybridForCausalLM", {**_LATENT, **_LINEAR}),
    "beam": Row("BeamForCausalLM", _SPARSE),
    "cohere2_moe": Row("Cohere2MoeForCausalLM", {"shared_expert_combination_strategy": "sum"}),
    "deepseek_ocr2": Row("DeepseekOcr2TextModel", _SPARSE),
    "deepseek_v32": Row("DeepseekV32ForCausalLM", _LATENT),
    "deepseek_v4": Row("DeepseekV4ForCausalLM"),
    "diffusion_gemma": Row("DiffusionGemmaEncoderTextModel"),
    "dots1": Row("Dots1ForCausalLM"),
    "dots3_note": Row("Dots3NoteForCausalLM", _LATENT),
    "ernie4_5_vl_moe": Row(
        "Ernie4_5_VLMoeTextModel",
        {"moe_intermediate_size": [12, 8], "rope_parameters": _MROPE},
    ),
    "exaone_moe": Row("ExaoneMoeForCausalLM"),
    "flex_olmo": Row("FlexOlmoForCausalLM"),
    "flint": Row("FlintForCausalLM", {"num_hidden_layers": 3}),
    "gemma4": Row(
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8},
    ),
    "glm4_moe_lite": Row("Glm4MoeLiteForCausalLM", _LATENT),
    "glm4v_moe": Row("Glm4vMoeTextModel", {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}}),
    "glm5_next": Row("Glm5NextTextModel", {**_LATENT, **_SPARSE, "qk_rope_head_dim": 0, "head_dim": 8, **_SMALL}),
    "glm_moe_dsa": Row("GlmMoeDsaForCausalLM", _LATENT),
    "granitemoe_swa": Row("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Row("GraniteMoeHybridForCausalLM", {"mamba_n_heads": 4, "layer_types": ["mamba", "attention"]}),
    "granitemoeshared": Row("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Row("HunYuanMoEV1ForCausalLM"),
    "hy_v3": Row("HYV3ForCausalLM"),
    "hy_v4": Row("HYV4ForCausalLM"),
    "hy_v4_vl": Row("HYV4VLTextModel"),
    "inkling": Row("InklingForCausalLM"),
    "inkling2": Row("Inkling2ForCausalLM"),
    "inkling2_loop": Row("Inkling2LoopForCausalLM"),
    "jamba": Row("JambaForCausalLM"),
    "kimi_linear": Row("KimiLinearForCausalLM", {**_LATENT, **_LINEAR}),
    "kolibri1": Row("Kolibri1ForCausalLM"),
    "laguna": Row("LagunaForCausalLM"),
    "lara_mini": Row("LaraMiniForCausalLM"),
    "lfm2_moe": Row("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mellum": Row("MellumForCausalLM"),
    "mimo_v2_flash": Row("MiMoV2FlashForCausalLM"),
    "minimax_m3_vl": Row("MiniMaxM3VLForCausalLM"),
    "mistral4": Row("Mistral4ForCausalLM", {**_LATENT, "rope_parameters": {**_ROPE, **_LLAMA_4_SCALING}}),
    "mistral_large4": Row("MistralLarge4TextModel", _LATENT),
    "muse_spark": Row("MuseSparkTextModel"),
    "openai_privacy_filter": Row("OpenAIPrivacyFilterForTokenClassification"),
    "qwen3_5_moe": Row("Qwen3_5MoeForCausalLM", _LINEAR),
    "qwen3_omni_moe": Row("Qwen3OmniMoeThinkerTextModel"),
    "qwen3_vl_moe": Row("Qwen3VLMoeTextModel"),
    "qwen4_exp": Row("Qwen4ExpForCausalLM", {**_LINEAR, **_INDEXER, "hc_lowrank": 8}),
    "solar_open": Row("SolarOpenForCausalLM"),
    "unlimited_ocr": Row("UnlimitedOcrTextModel"),
    "zaya": Row("ZayaForCausalLM", {"num_experts_per_tok": 1}),
}


def folders_of_transformers() -> list[str]:
    """The folders of the installed transformers in which experts use the interface."""
    models = Path(transformers.__file__).parent / "models"
    places = models.glob("*/modeling_*.py")
    return sorted({place.parent.name for place in places if "@use_experts_implementation" in place.read_text()})


def make(folder: str, **changes: Any) -> Any:
    """The tiny model of a folder, in eval mode."""
    if folder in NAMED:
        return make_model(NAMED[folder], **changes)
    torch.manual_seed(0)
    model, own = OTHERS[folder]
    cls = getattr(__import__(f"transformers.models.{folder}", fromlist=[model]), model)
    config = cls.config_class
    known = {*inspect.signature(config.__init__).parameters, *config.__dataclass_fields__, *config.attribute_map}
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return spread(cls(config(**{"experts_implementation": "eager", **sizes, **own, **changes}))).eval()


def forward(model: Any, ids: Tensor) -> Tensor:
    """What a model computes. Every parameter has a gradient then: zero until there is a backward pass."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    out = model(input_ids=ids, use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state


def outcome(model: Any, ids: Tensor | None = None) -> dict[str, Tensor]:
    """What a model computes, and the gradient of every parameter; zero where it has none."""
    y = forward(model, token_ids(2, 9) if ids is None else ids)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"output": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


assert _SIZES["vocab_size"] == VOCAB
