"""A tiny gpt-oss whose files have experts in MXFP4."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "dtype": torch.bfloat16,
}


def write_gpt_oss(folder: Path, **changes: Any) -> Any:
    """Write it, and give back the model that transformers decodes it to."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SIZES | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = dict(model.state_dict())
    for name in [n for n in state if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, I, O = state[name].shape  # noqa: E741
        blocks = torch.randint(256, (E, O, I // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 124, (E, O, I // 32), dtype=torch.uint8)
        model.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales)
        del state[name]
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    said = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(said))
    return model.eval()
