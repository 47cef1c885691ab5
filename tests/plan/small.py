"""A small model, and a file with its config."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from moesaic.plan.model import Planned, planned

EXPERTS, TOP_K, DIM, LAYERS = 8, 8, 32, 2


def config(**changes: Any) -> Qwen3MoeConfig:
    """Every token goes to all experts, so that what is expected of a routing is what happens."""
    sizes: dict[str, Any] = {
        "hidden_size": DIM,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 128,
    }
    return Qwen3MoeConfig(**(sizes | changes))


def small(**changes: Any) -> Planned:
    return planned(config(**changes), torch.float32, "small")


def config_file(folder: Path, **changes: Any) -> Path:
    file = folder / "small.json"
    file.write_text(json.dumps(config(**changes).to_dict()))
    return file
