"""Experts of known models, and routings of their tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from benchmarks.gpu.common import DEVICE, DRY_RUN
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """E experts, top K, model dim D, expert hidden dim F; fine-grained experts, wide ones, or neither."""

    name: str
    D: int
    F: int
    E: int
    K: int
    kind: str


# Those of most interest first.
SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, "fine"),
    Shape("Mixtral 8x7B", 4096, 14336, 8, 2, "wide"),
    Shape("OLMoE", 2048, 1024, 64, 8, "fine"),
    Shape("gpt-oss-120b", 2880, 2880, 128, 4, ""),
    Shape("DeepSeek-V3, EP 8", 7168, 2048, 32, 8, "wide"),
)
# Few, some and many: a step of decoding, a short and a long batch.
TOKENS = (64, 4096, 32768)
ROUTINGS = ("balanced", "zipf")
if DRY_RUN:
    SHAPES = (Shape("tiny", 40, 48, 4, 2, "fine"),)
    TOKENS = (6, 20)


class Weights(NamedTuple):
    """``w1``, ``w3 [E, D, F]`` and ``w2 [E, F, D]``."""

    w1: Tensor
    w3: Tensor
    w2: Tensor


def weights_of(shape: Shape) -> Weights:
    """The same at every call."""
    torch.manual_seed(0)
    E, D, H = shape.E, shape.D, shape.F
    return Weights(
        *(
            (torch.randn(E, n, m, device=DEVICE, dtype=torch.bfloat16) * n**-0.5).requires_grad_()
            for n, m in ((D, H), (D, H), (H, D))
        )
    )


def route(shape: Shape, tokens: int, routing: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids ``[T, K]``, no expert twice, and weights that sum to 1."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    popularity = 1.0 / torch.arange(1, shape.E + 1, device=DEVICE) if routing == "zipf" else torch.ones(shape.E)
    # Gumbel noise on the logarithm: a draw without replacement.
    noise = -torch.log(-torch.log(torch.rand(tokens, shape.E, generator=g, device=DEVICE).clamp(1e-9, 1 - 1e-7)))
    ids = (popularity.to(DEVICE).log() + noise).topk(shape.K, dim=1).indices
    weights = torch.rand(tokens, shape.K, generator=g, device=DEVICE) + 0.1
    return ids, weights / weights.sum(1, keepdim=True)
