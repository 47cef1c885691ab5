"""Decode with experts of 8 and 4 bits: one token through a layer's experts, against bf16, in one interleaved run.

Time is the median of ``--pairs`` rounds, in each of which every format has its turn: with one thread that thread's own
processor time, with more by the clock. Bytes are those of all experts.

    python benchmarks/quantized_cpu.py [--quick] [--pairs 15] [--threads 1] [--json benchmarks/results/NAME.json]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from as_they_come import QUICK, Results, print_table
from grouped_mm_cpu import processor
from torch import Tensor

from moesaic.ops import experts_mlp, quantize

BASE = "bf16"
FORMATS = ("int8", "nf4", "mxfp4")
SHAPES = {"128 experts": (128, 8, 2048, 768), "8 experts": (8, 2, 2048, 3584)}  # experts, top-k, model and hidden dim
CALLS = 8  # of a format in its turn


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    pairs: Annotated[int, tyro.conf.arg(help="timed rounds; every format runs once a round")] = 15
    threads: Annotated[int, tyro.conf.arg(help="torch threads")] = 1
    tokens: Annotated[int, tyro.conf.arg(help="tokens a call")] = 1
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes to run")] = tuple(SHAPES)
    json: Annotated[Path | None, tyro.conf.arg(help="also write the results there")] = None


def seconds_of(
    weights: list[Any], x_TD: Tensor, routing_TK: Tensor, num_experts: int, clock: Callable[[], float]
) -> float:
    """A call's, with other experts each time, so that none is in a cache."""
    T, K = routing_TK.shape
    total = 0.0
    for _ in range(CALLS):
        ids_TK = torch.stack([torch.randperm(num_experts)[:K] for _ in range(T)])
        start = clock()
        experts_mlp(x_TD, ids_TK, routing_TK, *weights, impl="cpu")
        total += clock() - start
    return total / CALLS


@torch.no_grad()
def measure(options: Options) -> Iterator[dict[str, Any]]:
    # On a busy machine a thread's own time leaves out what others take.
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for shape in options.shapes:
        E, K, D, F = SHAPES[shape]
        weights = [torch.randn(E, *sizes).mul_(sizes[0] ** -0.5) for sizes in ((D, F), (D, F), (F, D))]
        # Laid out as in checkpoints: the summed dim is contiguous.
        forms: dict[str, list[Any]] = {BASE: [w.bfloat16().mT.contiguous().mT for w in weights]}
        for name in FORMATS:
            forms[name] = [quantize(w, name) for w in weights]
        x_TD, routing_TK = torch.randn(options.tokens, D).bfloat16(), torch.rand(options.tokens, K)
        times: dict[str, list[float]] = {name: [] for name in forms}
        for turn in range(options.pairs + 2):
            for name, form in forms.items():
                seconds = seconds_of(form, x_TD, routing_TK, E, clock)
                if turn >= 2:
                    times[name].append(seconds)
        base = statistics.median(times[BASE])
        for name, form in forms.items():
            median = statistics.median(times[name])
            megabytes = sum(t.nbytes for t in form) / 1e6
            yield {
                "shape": shape,
                "format": name,
                "megabytes": megabytes,
                "us": median * 1e6,
                "tokens_per_s": options.tokens / median,
                "against_bf16": base / median,
            }


def cells(row: dict[str, Any]) -> list[str]:
    numbers = (f"{row['megabytes']:.0f}", f"{row['us']:.0f}", f"{row['tokens_per_s']:.0f}")
    return [row["shape"], row["format"], *numbers, f"{row['against_bf16']:.2f}x"]


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, pairs=3, shapes=("8 experts",))
    torch.set_num_threads(options.threads)
    about = {"processor": processor(), "threads": options.threads, "pairs": options.pairs}
    with Results(options.json, about, lambda row: "  ".join(cells(row))) as results:
        for row in measure(options):
            results.add(row)
    title = f"decoding on {options.threads} thread(s) of {processor()['model']}"
    print_table(title, ("shape", "format", "MB", "us a call", "tokens/s", "against bf16"), map(cells, results.rows))
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
