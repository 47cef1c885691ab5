"""Tokens per second of a MoE layer on CPU: moesaic against transformers' experts implementations.

All run interleaved in one process, and medians are compared, so that what else the machine does falls on all alike.

    python benchmarks/experts_cpu.py [--rounds 7] [--threads 1] [--json benchmarks/results/NAME.json]
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moesaic import MoE, MoEConfig


@dataclass(frozen=True)
class Shape:
    """A layer and how many tokens it gets: E experts, top K, D model dim, F expert hidden dim."""

    name: str
    E: int
    K: int
    D: int
    F: int
    tokens: int


SHAPES = (
    Shape("8 wide", 8, 2, 1024, 3584, 2048),
    Shape("64 fine", 64, 8, 1024, 512, 512),
    Shape("128 finer", 128, 8, 1024, 256, 1024),
)
PEERS = ("eager", "grouped_mm")
OURS = "moesaic"


@dataclass(frozen=True)
class Options:
    """What to run."""

    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; every implementation runs once a round")] = 7
    threads: Annotated[int, tyro.conf.arg(help="torch threads")] = 1
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes to run")] = tuple(s.name for s in SHAPES)
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


def peers(shape: Shape, backward: bool) -> tuple[str, ...]:
    """Those worth timing: the backward pass of `eager` is quadratic in the number of experts."""
    return tuple(peer for peer in PEERS if not (backward and peer == "eager" and shape.E > 8))


def make_layers(shape: Shape, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same weights in every implementation."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {}
    for peer in PEERS:
        config = Qwen3MoeConfig(
            hidden_size=shape.D,
            moe_intermediate_size=shape.F,
            num_experts=shape.E,
            num_experts_per_tok=shape.K,
            norm_topk_prob=True,
        )
        config._experts_implementation = peer
        layers[peer] = Qwen3MoeSparseMoeBlock(config).to(dtype)
    first = layers[PEERS[0]]
    for parameter in first.parameters():
        nn.init.normal_(parameter, std=0.02)
    for peer in PEERS[1:]:
        layers[peer].load_state_dict(first.state_dict())
    moe = MoE(MoEConfig(dim=shape.D, hidden_dim=shape.F, num_experts=shape.E, top_k=shape.K), dtype=dtype)
    w1, w3 = first.experts.gate_up_proj.detach().chunk(2, dim=1)
    with torch.no_grad():
        moe.experts.w1.copy_(w1.mT)
        moe.experts.w3.copy_(w3.mT)
        moe.experts.w2.copy_(first.experts.down_proj.mT)
        moe.router.weight.copy_(first.gate.weight)
    layers[OURS] = moe
    return layers


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    for parameter in layer.parameters():
        parameter.grad = None
    return y.detach()


def medians(run: Callable[[nn.Module, Tensor], Tensor], layers: dict[str, nn.Module], x: Tensor, rounds: int) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for timed in [False] + [True] * rounds:
        for name, layer in layers.items():
            start = time.perf_counter()
            run(layer, x)
            if timed:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def check_equal(layers: dict[str, nn.Module], x: Tensor) -> None:
    """Fast and wrong does not count.

    The median over tokens, since transformers' gate runs in half precision and ours in fp32: near ties go elsewhere.
    """
    expected = forward(layers[PEERS[0]], x).double()
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    for name, layer in layers.items():
        errors = (forward(layer, x).double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.median() < tolerance, f"{name}: relative error {errors.median():.2g}"


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    table = Table(title=f"MoE layer, tokens/s, {options.threads} thread(s), median of {options.rounds} rounds")
    names = [*PEERS, OURS]
    for column in ("shape", "dtype", "pass", *names, "against best peer"):
        table.add_column(column, justify="left" if column in ("shape", "dtype", "pass") else "right")
    rows = []
    for shape in (s for s in SHAPES if s.name in options.shapes):
        for dtype in (torch.float32, torch.bfloat16):
            layers = make_layers(shape, dtype)
            x = torch.randn(1, shape.tokens, shape.D, dtype=dtype)
            check_equal(layers, x)
            for label, run in (("forward", forward), ("forward+backward", forward_backward)):
                timed = peers(shape, backward=run is forward_backward)
                seconds = medians(run, {name: layers[name] for name in (*timed, OURS)}, x, options.rounds)
                rate = {name: shape.tokens / s for name, s in seconds.items()}
                ratio = rate[OURS] / max(rate[p] for p in timed)
                text = str(dtype).removeprefix("torch.")
                cells = (f"{rate[n]:,.0f}" if n in rate else "-" for n in names)
                table.add_row(shape.name, text, label, *cells, f"{ratio:.2f}x")
                rows.append(
                    {"shape": asdict(shape), "dtype": text, "pass": label, "tokens_per_s": rate, "ratio": ratio}
                )
    Console().print(table)
    if options.json:
        record = {
            "what": "MoE layer on CPU",
            "threads": options.threads,
            "rounds": options.rounds,
            "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
