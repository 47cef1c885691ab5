"""The CPU kernels of grouped_mm against `torch.nn.functional.grouped_mm` and against the processor's own limits.

Everything runs interleaved in one process and medians are compared, so that what else the machine does falls on all
alike. One thread is timed by its own processor time, several by the clock. The peak is that of multiply-adds on
registers alone, the bandwidth that of a large copy, both measured here; a row's roofline is the larger of the times
that its operations and its bytes need.

    python benchmarks/grouped_mm_cpu.py [--quick] [--rounds 5] [--threads 1 2] [--json benchmarks/results/NAME.json]
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from as_they_come import QUICK, Results
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moesaic.ops.native import DTYPES, Kernels, kernels
from moesaic.ops.processor import INSTRUCTION_SETS, cpuinfo


@dataclass(frozen=True)
class Shape:
    """E matrices of K x N, and R rows over them, laid out in each of some ways."""

    name: str
    E: int
    K: int
    N: int
    R: int
    layouts: tuple[str, ...] = ("balanced", "zipf")

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[:1] if self.layouts == DECODE else PASSES


PASSES = ("forward", "input gradient", "weight gradient")
DECODE = ("decode",)
TOP_K = 8
SHAPES = (
    Shape("8 x 1024 x 3584, 4096 rows", 8, 1024, 3584, 4096),
    Shape("64 x 1024 x 512, 4096 rows", 64, 1024, 512, 4096),
    Shape("64 x 1024 x 512, 32768 rows", 64, 1024, 512, 32768),
    Shape("128 x 1024 x 256, 8192 rows", 128, 1024, 256, 8192),
    Shape("64 x 1024 x 512, 1 token", 64, 1024, 512, TOP_K, DECODE),
    Shape("64 x 1024 x 512, 16 tokens", 64, 1024, 512, 16 * TOP_K, DECODE),
    Shape("128 x 1024 x 256, 1 token", 128, 1024, 256, TOP_K, DECODE),
    Shape("128 x 1024 x 256, 16 tokens", 128, 1024, 256, 16 * TOP_K, DECODE),
)
QUICK_SHAPES = (1, 3, 5)
OURS, PEER = "cpu", "F.grouped_mm"

# What keeps the C library from handing memory back, so that a peer's results cost no page faults the second time.
WARM = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; each runs everything once")] = 5
    threads: Annotated[tuple[int, ...], tyro.conf.arg(help="numbers of threads")] = (1, 2)
    shapes: Annotated[tuple[int, ...], tyro.conf.arg(help="which shapes, counted from 0")] = tuple(range(len(SHAPES)))
    allocator: Annotated[
        Literal["warm", "default"], tyro.conf.arg(help="warm: the C library keeps freed memory, which favours the peer")
    ] = "warm"
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


def group_sizes(shape: Shape, layout: str) -> list[Tensor]:
    """Equal groups; groups that fall off with their rank, in random order; or tokens that each go to 8 experts, several
    times, so that no cache holds the weights that the next step needs.
    """
    generator = torch.Generator().manual_seed(0)
    if layout == "balanced":
        return [torch.full((shape.E,), shape.R // shape.E)]
    if layout == "decode":
        tokens = shape.R // TOP_K

        def step() -> Tensor:
            experts = [torch.randperm(shape.E, generator=generator)[:TOP_K] for _ in range(tokens)]
            return torch.bincount(torch.cat(experts), minlength=shape.E)

        return [step() for _ in range(16)]
    share = 1 / torch.arange(1, shape.E + 1, dtype=torch.float64)
    ends = (shape.R * share.cumsum(0) / share.sum()).round().long()
    sizes = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    return [sizes[torch.randperm(shape.E, generator=generator)]]


def calls(shape: Shape, dtype: torch.dtype, steps: list[Tensor]) -> dict[str, dict[str, Callable[[], list[Tensor]]]]:
    """For each pass, the same products by each implementation."""
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (
        torch.randn(s, generator=generator).to(dtype)
        for s in ((shape.R, shape.K), (shape.E, shape.K, shape.N), (shape.R, shape.N))
    )
    with_ends = [(sizes, sizes.cumsum(0).to(torch.int32)) for sizes in steps]
    ops, peer = torch.ops.moesaic, torch.nn.functional.grouped_mm
    return {
        "forward": {
            OURS: lambda: [ops.grouped_mm(x, w, sizes, OURS) for sizes, _ in with_ends],
            PEER: lambda: [peer(x, w, offs=ends) for _, ends in with_ends],
        },
        "input gradient": {
            OURS: lambda: [ops.grouped_mm_input_grad(grad, w, sizes, OURS) for sizes, _ in with_ends],
            PEER: lambda: [peer(grad, w.mT, offs=ends) for _, ends in with_ends],
        },
        "weight gradient": {
            OURS: lambda: [ops.grouped_mm_weight_grad(x, grad, sizes, w, OURS) for sizes, _ in with_ends],
            PEER: lambda: [peer(x.mT, grad, offs=ends) for _, ends in with_ends],
        },
    }


def bytes_moved(shape: Shape, dtype: torch.dtype, steps: list[Tensor]) -> int:
    """Each row and each matrix that has rows read once, the result written once: what no cache can save."""
    matrices = sum(int(sizes.count_nonzero()) for sizes in steps)
    rows = len(steps) * shape.R
    return dtype.itemsize * (rows * shape.K + matrices * shape.K * shape.N + rows * shape.N)


class Machine:
    """The limits of `threads` threads, measured anew each time that they are asked for."""

    def __init__(self, threads: int) -> None:
        loaded = kernels()
        if not isinstance(loaded, Kernels):
            sys.exit(f"there are no CPU kernels here: {loaded}")
        self.threads, self.loaded = threads, loaded
        self.source, self.target = torch.ones(1 << 26), torch.ones(1 << 26)
        self.clock = time.thread_time if threads == 1 else time.perf_counter

    def seconds(self, run: Callable[[], Any]) -> float:
        start = self.clock()
        run()
        return self.clock() - start

    def peak(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of multiply-adds on registers; a thread has a processor to itself."""
        start = time.thread_time()
        done = self.loaded.library.moesaic_cpu_spin(2_000_000, DTYPES[dtype], self.loaded.isa)
        return self.threads * done / (time.thread_time() - start)

    def bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy that no cache holds."""
        return 2 * self.source.nbytes / self.seconds(lambda: self.target.copy_(self.source))


def check_equal(by_implementation: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Fast and wrong does not count."""
    ours, peers = (by_implementation[name]()[0] for name in (OURS, PEER))
    error = (ours.double() - peers.double()).norm() / peers.double().norm()
    assert error < (1e-5 if ours.dtype == torch.float32 else 1e-2), f"relative error {error:.2g}"


def measure(shape: Shape, dtype: torch.dtype, layout: str, machine: Machine, rounds: int) -> list[dict[str, Any]]:
    steps = group_sizes(shape, layout)
    passes = {name: call for name, call in calls(shape, dtype, steps).items() if name in shape.passes}
    for by_implementation in passes.values():
        check_equal(by_implementation)
    seconds: dict[tuple[str, str], list[float]] = {(p, i): [] for p in passes for i in (OURS, PEER)}
    peaks, bandwidths = [], []
    for _ in range(rounds):
        peaks.append(machine.peak(dtype))
        bandwidths.append(machine.bandwidth())
        for name, by_implementation in passes.items():
            for implementation, run in by_implementation.items():
                seconds[name, implementation].append(machine.seconds(run))
    peak, bandwidth = statistics.median(peaks), statistics.median(bandwidths)
    operations = 2 * len(steps) * shape.R * shape.K * shape.N
    needed = {"compute": operations / peak, "memory": bytes_moved(shape, dtype, steps) / bandwidth}
    rows = []
    for name in passes:
        ours, peers = (statistics.median(seconds[name, i]) for i in (OURS, PEER))
        rows.append(
            {
                "shape": shape.name,
                "layout": layout,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": machine.threads,
                "pass": name,
                "gflops": {OURS: operations / ours / 1e9, PEER: operations / peers / 1e9},
                "peak_gflops": peak / 1e9,
                "bandwidth_gb": bandwidth / 1e9,
                "of_peak": operations / ours / peak,
                "peer_of_peak": operations / peers / peak,
                "roofline": max(needed, key=lambda limit: needed[limit]),
                "of_roofline": max(needed.values()) / ours,
                "ratio": peers / ours,
            }
        )
    return rows


def processor() -> dict[str, str]:
    known = cpuinfo()
    return {"vendor": known.get("vendor_id", "unknown"), "model": known.get("model name", platform.processor())}


def library_of_peak(machine: Machine, rounds: int) -> float:
    """torch's fp32 product of two large squares, as a fraction of the peak: on some vendors' processors it is low."""
    a = torch.randn(2048, 2048)
    (a @ a).sum()
    taken = [(machine.peak(torch.float32), machine.seconds(lambda: a @ a)) for _ in range(rounds)]
    return statistics.median(2 * 2048**3 / seconds / peak for peak, seconds in taken)


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["shape"],
        row["layout"],
        row["dtype"],
        str(row["threads"]),
        row["pass"],
        f"{row['gflops'][OURS]:,.0f}",
        f"{row['of_peak']:.2f}",
        f"{row['gflops'][PEER]:,.0f}",
        f"{row['ratio']:.2f}x",
        row["roofline"],
        f"{row['of_roofline']:.2f}",
    ]


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, rounds=1, threads=options.threads[:1], shapes=QUICK_SHAPES)
    if options.allocator == "warm" and any(name not in os.environ for name in WARM):
        # The C library reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | WARM)
    loaded = kernels()
    isa = INSTRUCTION_SETS[loaded.isa] if isinstance(loaded, Kernels) else "none"
    title = f"grouped_mm on CPU ({isa}), {options.allocator} allocator, median of {options.rounds} rounds"
    table = Table(title=title)
    for column in ("shape", "layout", "dtype", "threads", "pass"):
        table.add_column(column)
    for column in ("GFLOP/s", "of peak", PEER, "ratio", "roofline", "of it"):
        table.add_column(column, justify="right")
    about, of_peak = processor(), dict[int, float]()
    record = {
        "what": "grouped_mm on CPU",
        "rounds": options.rounds,
        "allocator": options.allocator,
        "processor": about,
        "isa": isa,
        "torch_fp32_product_of_peak": of_peak,
        "versions": {"torch": torch.__version__},
    }
    with Results(options.json, record, lambda row: "  ".join(cells(row))) as results:
        for threads in options.threads:
            torch.set_num_threads(threads)
            machine = Machine(threads)
            of_peak[threads] = library_of_peak(machine, options.rounds)
            for shape in (SHAPES[i] for i in options.shapes):
                for layout in shape.layouts:
                    for dtype in (torch.float32, torch.bfloat16):
                        results.add(measure(shape, dtype, layout, machine, options.rounds))
    for row in results.rows:
        table.add_row(*cells(row))
    console = Console(width=140)
    console.print(table)
    for threads, fraction in of_peak.items():
        console.print(f"{about['vendor']}, {threads} thread(s): torch's fp32 product has {fraction:.2f} of the peak")
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
