"""Low-rank adapters on the experts of a layer, on CPU: a forward and a backward pass, three ways.

- ``frozen``: no adapters, the weights frozen: what every way below does at least.
- ``adapters``: moesaic's adapters, `experts_lora`.
- ``summed``: the products of the factors are added to the weights in each pass, as peft's `ParamWrapper` does, and the
  experts run on the sums.

Gradients are of tokens, routing weights and factors. The ways run interleaved in one process; medians are compared.

    python benchmarks/lora_cpu.py [--quick] [--rounds 5] [--threads 1] [--rank 8] [--json benchmarks/results/NAME.json]
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
from torch import Tensor

from moesaic.ops import experts_lora, experts_mlp

SHAPES = (Shape("8 wide", 8, 2, 1024, 3584, 512), Shape("64 fine", 64, 8, 1024, 512, 512))
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; every way runs once a round")] = 5
    threads: Annotated[int, tyro.conf.arg(help="torch threads")] = 1
    rank: Annotated[int, tyro.conf.arg(help="rank of the adapters")] = 8
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes to run")] = tuple(s.name for s in SHAPES)
    json: Annotated[Path | None, tyro.conf.arg(help="also write the results there")] = None


@dataclass(frozen=True)
class Result:
    """Milliseconds of a forward and a backward pass by way."""

    shape: str
    dtype: str
    rank: int
    ms: dict[str, float]


def ways(shape: Shape, dtype: torch.dtype, rank: int) -> dict[str, Callable[[], Any]]:
    """For each way a function that makes one forward and one backward pass."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * 0.05).to(dtype)

    E, K, D, F, T = shape.E, shape.K, shape.D, shape.F, shape.tokens
    x, w1, w3, w2 = draw(T, D).requires_grad_(), draw(E, D, F), draw(E, D, F), draw(E, F, D)
    weights, ids = torch.rand(T, E, generator=generator).topk(K)
    weights = weights.requires_grad_()
    a_up, b1, b3, a_down, b2 = (
        draw(*size).requires_grad_() for size in ((E, D, rank), (E, rank, F), (E, rank, F), (E, F, rank), (E, rank, D))
    )
    grad = draw(T, D)

    def backward(z: Tensor, *factors: Tensor) -> None:
        torch.autograd.grad(z, (x, weights, *factors), grad)

    def frozen() -> None:
        backward(experts_mlp(x, ids, weights, w1, w3, w2))

    def adapters() -> None:
        pairs = {"lora1": (a_up, b1), "lora3": (a_up, b3), "lora2": (a_down, b2)}
        backward(experts_lora(x, ids, weights, w1, w3, w2, **pairs), a_up, b1, b3, a_down, b2)

    def summed() -> None:
        sums = (torch.baddbmm(w, a, b) for w, a, b in ((w1, a_up, b1), (w3, a_up, b3), (w2, a_down, b2)))
        backward(experts_mlp(x, ids, weights, *sums), a_up, b1, b3, a_down, b2)

    return {"frozen": frozen, "adapters": adapters, "summed": summed}


def measure(options: Options) -> Iterator[Result]:
    for shape in (s for s in SHAPES if s.name in options.shapes):
        for dtype in DTYPES:
            calls = ways(shape, dtype, options.rank)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():
                call()
            for _ in range(options.rounds):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    times[name].append(1e3 * (time.perf_counter() - start))
            medians = {name: statistics.median(values) for name, values in times.items()}
            yield Result(shape.name, str(dtype).removeprefix("torch."), options.rank, medians)


def cells(row: dict[str, Any]) -> list[str]:
    milliseconds = [f"{row['ms'][way]:.0f}" for way in ("frozen", "adapters", "summed")]
    return [row["shape"], row["dtype"], str(row["rank"]), *milliseconds]


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, rounds=1, shapes=("64 fine",))
    torch.set_num_threads(options.threads)
    about = {"processor": processor(), "threads": options.threads}
    with Results(options.json, about, lambda row: "  ".join(cells(row)), key="results") as results:
        for result in measure(options):
            results.add(asdict(result))
    title = f"milliseconds of a forward and a backward pass on {options.threads} thread(s) of {processor()['model']}"
    print_table(title, ("shape", "dtype", "rank", "frozen", "adapters", "summed"), map(cells, results.rows))
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
