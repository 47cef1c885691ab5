"""How much arithmetic a token is, and how much a device can do.

As in PaLM (arXiv 2204.02311, appendix B): a token meets each weight of a product once forward and twice backward, two
operations each. What is computed again does not count. Of experts count those that a token goes to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic.layers import GroupedExperts, MoE, TopKRouter

# Dense bf16 products, 10^12 operations a second, from the makers' data sheets. The first that is in the name counts.
_PEAKS = {
    "B200": 2250.0,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "MI300X": 1307.4,
}


def known_peak(device: torch.device, dtype: str) -> float | None:
    """The peak of a device in 10^12 operations a second, None if it is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Operations for a token, forward and backward: 6 for each weight that it meets, 4 for a frozen one, and attention.

    Of attention ``12 * layers * heads * head dim * seq_len``, for models whose config has these names. Embeddings are
    looked up and do not count.
    """
    total = 0.0
    for module in model.modules():
        if isinstance(module, MoE):
            config = module.config
            matrices = 3 if config.gated else 2
            weights = matrices * config.dim * config.hidden_dim * config.top_k
            total += weights * _passes(module.experts)
            for adapter in (module.experts.adapters or {}).values():
                share = config.top_k / config.num_experts
                total += 6 * share * sum(factor.numel() for factor in adapter.parameters())
        elif isinstance(module, nn.Linear | TopKRouter):
            total += module.weight.numel() * (6 if module.weight.requires_grad else 4)
    return total + _attention(model, seq_len)


def _passes(experts: GroupedExperts) -> int:
    """Operations for a weight: a frozen one has no gradient of its own."""
    return 6 if any(p.requires_grad for p in experts.parameters(recurse=False)) else 4


def _attention(model: Any, seq_len: int) -> float:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return 0.0
    text = config.get_text_config()
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return 0.0
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 12.0 * layers * heads * head_dim * seq_len
