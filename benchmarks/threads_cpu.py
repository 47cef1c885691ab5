"""What threads give on CPU: N threads against N processes of one thread, and threads that are too many for the cores.

    python benchmarks/threads_cpu.py [--quick] [--rounds 7] [--threads 2] [--json benchmarks/results/NAME.json]

Three numbers for a layer, forward, and forward and backward, by a clock on the wall, so the machine has to be quiet:

- *scaling*: the work of N threads in one process, divided by that of N processes of one thread that run at the same
  time, each on a problem of the same size. 1 says that nothing is lost to the sharing of work.
- *oversubscribed*: the time of transformers' `grouped_mm` divided by ours, both with twice as many threads as cores.
- *pinned*: the same ratio with N threads on one core, in one round: transformers may take thirty times as long there.

Each way has a process of its own, which the others leave alone while it measures. Ratios are medians over rounds.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from as_they_come import QUICK, Results, print_table
from experts_cpu import GROUPED, OURS, SHAPES, Shape, make_layers, step
from grouped_mm_cpu import processor

WHATS = ("forward", "forward+backward")
COLUMNS = ("scaling", "oversubscribed", "pinned")


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; every way runs once a round")] = 7
    threads: Annotated[int, tyro.conf.arg(help="how many, at most one a core")] = 2
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes to run")] = tuple(s.name for s in SHAPES)
    json: Annotated[Path | None, tyro.conf.arg(help="also write the results there")] = None


def work(pipe: Connection, shape: Shape, dtype: torch.dtype, threads: int, cores: list[int]) -> None:
    """Answer names of a pass and of a layer with the seconds that it took, until there are none."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers = make_layers(shape, dtype)
    x = torch.randn(1, shape.tokens, shape.D, dtype=dtype)
    while (asked := pipe.recv()) is not None:
        what, name = asked
        start = time.perf_counter()
        if what == "forward":
            with torch.no_grad():
                layers[name](x)
        else:
            step(layers[name], x)
        pipe.send(time.perf_counter() - start)


@contextmanager
def worker(shape: Shape, dtype: torch.dtype, threads: int, cores: list[int]) -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(there, shape, dtype, threads, cores))
    process.start()
    try:
        yield here
        here.send(None)
    finally:
        process.join(10)
        process.kill()


def seconds(workers: list[Connection], what: str, name: str) -> float:
    """Of one pass, all of them at the same time; the mean."""
    for pipe in workers:
        pipe.send((what, name))
    return statistics.mean(pipe.recv() for pipe in workers)


def measure(shape: Shape, dtype: torch.dtype, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:

        def new(threads: int, on: list[int]) -> Connection:
            return stack.enter_context(worker(shape, dtype, threads, on))

        together, alone = [new(threads, cores)], [new(1, cores) for _ in range(threads)]
        many, pinned = [new(2 * len(cores), cores)], [new(threads, cores[:1])]
        for what in WHATS:
            found: dict[str, list[float]] = {name: [] for name in COLUMNS}
            for round in range(-1, rounds):  # the first one warms up
                ratios = [seconds(alone, what, OURS) / (threads * seconds(together, what, OURS))]
                for workers in (many, pinned)[: 2 if round < 1 else 1]:
                    ours = seconds(workers, what, OURS)
                    ratios.append(seconds(workers, what, GROUPED) / ours)
                for name, ratio in zip(COLUMNS, ratios, strict=False):
                    if round >= 0:
                        found[name].append(ratio)
            medians = {name: statistics.median(values) for name, values in found.items()}
            dtype_name = str(dtype).removeprefix("torch.")
            yield {
                "shape": shape.name,
                "dtype": dtype_name,
                "what": what,
                "threads": threads,
                "rounds": rounds,
            } | medians


def cells(row: dict[str, Any]) -> list[str]:
    return [row["shape"], row["dtype"], row["what"], *(f"{row[name]:.2f}" for name in COLUMNS)]


def main(options: Options) -> None:
    if options.threads > len(os.sched_getaffinity(0)):
        raise SystemExit(
            f"--threads: {options.threads} are more than the {len(os.sched_getaffinity(0))} cores; take less"
        )
    if options.quick:
        options = replace(options, rounds=1, shapes=("128 finer",))
    about = {"what": "threads on CPU", "processor": processor(), "torch": torch.__version__}
    with Results(options.json, about, lambda row: "  ".join(cells(row))) as results:
        for shape in (s for s in SHAPES if s.name in options.shapes):
            for dtype in (torch.float32, torch.bfloat16):
                for row in measure(shape, dtype, options.threads, options.rounds):
                    results.add(row)
    print_table(processor()["model"], ("shape", "dtype", "pass", *COLUMNS), map(cells, results.rows))
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
