"""An optimizer step for the weights of one MoE layer, on CPU: AdamW, Muon in bf16, Muon in fp32.

Beside it a forward and a backward pass of the layer, which says what part of a training step that is. All run
interleaved in one process with one thread. Times are those that the thread has computed, not those of a clock on the
wall, so that other processes on the machine count less; medians are compared.

    python benchmarks/muon_cpu.py [--quick] [--rounds 5] [--json benchmarks/results/NAME.json]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from as_they_come import QUICK, Results, print_table
from experts_cpu import Shape
from grouped_mm_cpu import processor
from torch.optim import AdamW, Optimizer

import moesaic
from moesaic.optim import Muon, param_groups

SHAPES = (Shape("4 wide", 4, 2, 512, 1792, 2048), Shape("16 fine", 16, 4, 512, 256, 2048))
WAYS = ("layer", "adamw", "muon bf16", "muon fp32")


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; every way runs once a round")] = 5
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes to run")] = tuple(s.name for s in SHAPES)
    json: Annotated[Path | None, tyro.conf.arg(help="also write the results there")] = None


@dataclass(frozen=True)
class Result:
    """Milliseconds of a pass of the layer (forward and backward) and of the steps of each optimizer."""

    shape: str
    tokens: int
    parameters: int
    ms: dict[str, float]


def ways(shape: Shape) -> tuple[int, dict[str, Callable[[], Any]]]:
    """The number of parameters, and for each way a function that does it once."""
    torch.manual_seed(0)
    moe = moesaic.MoE(moesaic.MoEConfig(dim=shape.D, hidden_dim=shape.F, num_experts=shape.E, top_k=shape.K))
    x = torch.randn(shape.tokens, shape.D, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.D)

    def layer() -> None:
        moe.zero_grad()
        moe(x).backward(grad)

    layer()
    optimizers: dict[str, Optimizer] = {"adamw": AdamW(moe.parameters(), fused=True)}
    for name, dtype in (("muon bf16", torch.bfloat16), ("muon fp32", torch.float32)):
        optimizers[name] = Muon(param_groups(moe), ns_dtype=dtype)
    count = sum(parameter.numel() for parameter in moe.parameters())
    return count, {"layer": layer} | {name: optimizer.step for name, optimizer in optimizers.items()}


def measure(options: Options) -> Iterator[Result]:
    for shape in (s for s in SHAPES if s.name in options.shapes):
        count, calls = ways(shape)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(options.rounds):
            for name, call in calls.items():
                start = time.thread_time()
                call()
                times[name].append(1e3 * (time.thread_time() - start))
        yield Result(shape.name, shape.tokens, count, {n: statistics.median(values) for n, values in times.items()})


def cells(row: dict[str, Any]) -> list[str]:
    milliseconds = [f"{row['ms'][way]:.1f}" for way in WAYS]
    return [row["shape"], f"{row['parameters'] / 1e6:.1f}", str(row["tokens"]), *milliseconds]


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, rounds=1, shapes=("16 fine",))
    torch.set_num_threads(1)
    with Results(options.json, {"processor": processor()}, lambda row: "  ".join(cells(row)), key="results") as results:
        for result in measure(options):
            results.add(asdict(result))
    title = f"milliseconds of one thread of {processor()['model']}"
    print_table(title, ("shape", "10^6 parameters", "tokens", "layer", *WAYS[1:]), map(cells, results.rows))
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
