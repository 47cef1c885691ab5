"""Experts of known models, and routings of their tokens."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from benchmarks.gpu.common import DEVICE, DRY_RUN
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """E experts, top K, model dim D, expert hidden dim F."""

    name: str
    D: int
    F: int
    E: int
    K: int
    is_fine: bool


SHAPES = (
    Shape("Mixtral 8x7B", 4096, 14336, 8, 2, False),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, True),
    Shape("OLMoE", 2048, 1024, 64, 8, True),
    Shape("DeepSeek-V3, EP 8", 7168, 2048, 32, 8, True),
    Shape("gpt-oss-120b", 2880, 2880, 128, 4, True),
)
TOKENS = (64, 4096, 32768)
ROUTINGS = ("balanced", "zipf")
if DRY_RUN:
    SHAPES = (Shape("tiny", 40, 48, 4, 2, True),)
    TOKENS = (20,)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rounds: Annotated[int, tyro.conf.arg(help="timed calls; the median counts")] = 20
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes")] = tuple(s.name for s in SHAPES)
    tokens: tuple[int, ...] = TOKENS
    dry_run: Annotated[bool, tyro.conf.arg(help="tiny sizes on the CPU")] = False


def route(shape: Shape, tokens: int, routing: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids ``[T, K]``, no expert twice, and weights that sum to 1."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    popularity = 1.0 / torch.arange(1, shape.E + 1, device=DEVICE) if routing == "zipf" else torch.ones(shape.E)
    # Gumbel noise on the logarithm: a draw without replacement.
    noise = -torch.log(-torch.log(torch.rand(tokens, shape.E, generator=g, device=DEVICE).clamp(1e-9, 1 - 1e-7)))
    ids = (popularity.to(DEVICE).log() + noise).topk(shape.K, dim=1).indices
    weights = torch.rand(tokens, shape.K, generator=g, device=DEVICE) + 0.1
    return ids, weights / weights.sum(1, keepdim=True)
