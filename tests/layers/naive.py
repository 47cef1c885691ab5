"""A mixture-of-experts layer the slow way: token by token and expert by expert, in fp64."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import moesaic

GATES = {
    "silu": lambda h1, h3: F.silu(h1) * h3,
    "gelu": lambda h1, h3: F.gelu(h1) * h3,
    "clamped_swiglu": lambda h1, h3: (h3.clamp(-7, 7) + 1) * h1.clamp(max=7) * (1.702 * h1.clamp(max=7)).sigmoid(),
}


def moe(layer: moesaic.MoE, x: Tensor) -> Tensor:
    """``layer(x)`` by a loop over tokens, differentiable in ``x`` and in the parameters of ``layer``."""
    config, gate = layer.config, GATES[layer.config.activation]
    experts, shared = layer.experts, layer.shared
    outputs = []
    for token in x.reshape(-1, config.dim).unbind():
        logits = layer.router.weight @ token + or_zero(layer.router.logit_bias)
        scores = logits.softmax(0) if config.score == "softmax" else logits.sigmoid()
        bias = [0.0] * config.num_experts if layer.router.bias is None else layer.router.bias.tolist()
        chosen = choose(config, scores.tolist(), bias)
        weights = torch.stack([scores[e] for e in chosen])
        if config.normalize_top_k:
            weights = weights / weights.sum()
        y = torch.zeros_like(token)
        for weight, e in zip(weights * config.route_scale, chosen, strict=True):
            before, after = (weight, 1) if config.weigh_inputs else (1, weight)
            b1, b3, b2 = (or_zero(None if b is None else b[e]) for b in (experts.b1, experts.b3, experts.b2))
            hidden = gate(before * token @ experts.w1[e] + b1, before * token @ experts.w3[e] + b3)
            y = y + after * (hidden @ experts.w2[e] + b2)
        if shared is not None:
            weight = 1 if shared.gate is None else (shared.gate.weight @ token).sigmoid()
            y = y + weight * (shared.w2.weight @ gate(shared.w1.weight @ token, shared.w3.weight @ token))
        outputs.append(y)
    return torch.stack(outputs).reshape(x.shape) if outputs else x * 0


def or_zero(bias: Tensor | None) -> Tensor | int:
    return 0 if bias is None else bias


def choose(config: moesaic.MoEConfig, scores: list[float], bias: list[float]) -> list[int]:
    """The experts of one token, the best first, in plain Python."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = config.num_experts // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
    best = [sum(sorted((biased[e] for e in group), reverse=True)[: config.group_best]) for group in groups]
    kept = sorted(range(config.num_groups), key=lambda g: -best[g])[: config.top_groups]
    candidates = [e for g in kept for e in groups[g]]
    return sorted(candidates, key=lambda e: -biased[e])[: config.top_k]


def make(dtype: torch.dtype = torch.float64, *, seed: int = 0, **options) -> moesaic.MoE:
    """A layer whose routing is far from ties and whose gradients are of order one."""
    sizes = {"dim": 6, "hidden_dim": 5, "num_experts": 8, "top_k": 3}
    layer = moesaic.MoE(moesaic.MoEConfig(**sizes | options), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        scale = 1 / math.sqrt(parameter.shape[-1])
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    if layer.router.bias is not None:
        layer.router.bias.copy_(torch.randn(layer.router.bias.shape, generator=generator) * 0.3)
    return layer.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def in_fp64(layer: moesaic.MoE) -> moesaic.MoE:
    """The same weights in fp64."""
    return copy.deepcopy(layer).double()


def gradients(layer: moesaic.MoE, x: Tensor, y: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter and of the input."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return dict(zip([*names, "x"], torch.autograd.grad(y, [*parameters, x], grad), strict=True))
