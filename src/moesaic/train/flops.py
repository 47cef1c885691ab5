"""How much arithmetic a token is, and how much a device can do.

As in PaLM (arXiv 2204.02311, appendix B): a token meets each weight of a product once forward and twice backward, two
operations each. What is computed again does not count. Of experts count those that a token goes to. Attention counts
as if each token met all others, or all of its window: that half of it is masked away makes it no less, as in most
published numbers. ``moesaic plan`` has its numbers from here, so its MFU is that of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moesaic.layers import GroupedExperts, MoE, TopKRouter

# Dense bf16 products, 10^12 operations a second, from the makers' data sheets. The first that is in the name counts.
PEAKS = {
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
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Attention:
    """Of one layer: heads of queries and of keys, their dims, and how far a token looks back; None for all the way."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    window: int | None

    def flops(self, seq_len: int) -> int:
        """Of the products with keys and values, for a token, forward, by the convention above."""
        seen = seq_len if self.window is None else min(self.window, seq_len)
        return 2 * seen * self.heads * (self.key_dim + self.value_dim)

    def causal_flops(self, seq_len: int) -> float:
        """What a kernel computes that leaves out what is masked: of a token on average."""
        seen = seq_len / 2 if self.window is None else min(self.window, seq_len / 2)
        return 2 * seen * self.heads * (self.key_dim + self.value_dim)


def attention_of(config: Any, index: int) -> Attention:
    """Of a layer of a transformers model."""
    heads = config.num_attention_heads
    plain = getattr(config, "head_dim", None) or config.hidden_size // heads
    nope = getattr(config, "qk_nope_head_dim", None)
    key_dim = nope + config.qk_rope_head_dim if nope else plain
    types = getattr(config, "layer_types", None)
    slides = types[index] == "sliding_attention" if types else True
    window = getattr(config, "sliding_window", None) if slides else None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return Attention(heads, key_heads, key_dim, getattr(config, "v_head_dim", None) or plain, window)


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Operations for a token, forward and backward: 6 for each weight that it meets, 4 for a frozen one, and attention.

    Of attention ``12 * heads * head dim * seq_len`` for each layer, or of the length of its window, for models whose
    config has these names. Embeddings are looked up and do not count.
    """
    return weight_flops(model) + _attention_flops(model, seq_len)


def weight_flops(model: nn.Module) -> float:
    """The part of :func:`flops_per_token` that is of weights."""
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
    return total


def _passes(experts: GroupedExperts) -> int:
    """Operations for a weight: a frozen one has no gradient of its own."""
    return 6 if any(p.requires_grad for p in experts.parameters(recurse=False)) else 4


def _attention_flops(model: Any, seq_len: int) -> float:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return 0.0
    text = config.get_text_config()
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return 0.0
    return 3.0 * sum(attention_of(text, i).flops(seq_len) for i in range(layers))
