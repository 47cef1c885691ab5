"""What the GPU benchmarks share: timing, ceilings, poison, CUDA graphs, the record of a run.

With ``--dry-run`` everything runs at tiny sizes on the CPU, the kernels in Triton's interpreter: it shows that a script
works, and its times mean nothing.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch does

import torch  # noqa: E402
import triton  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

DEVICE = "cpu" if DRY_RUN else "cuda"
RESULTS = Path(__file__).parents[1] / "results"


def require_gpu() -> None:
    if not DRY_RUN and not torch.cuda.is_available():
        raise SystemExit("no GPU here: run on one, or with --dry-run to see that the script works")


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """Median time of a call, the L2 cache filled with other things before each."""
    if DRY_RUN:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    run()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    pairs = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def ceilings(rounds: int) -> dict[str, float]:
    """TFLOP/s of a large bf16 product and GB/s, read and written, of a large copy."""
    n = 64 if DRY_RUN else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty((1 if DRY_RUN else 1024) << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * n**3 / milliseconds(lambda: a @ b, rounds) / 1e9,
        "copy_gb_per_s": 2 * source.numel() / milliseconds(lambda: target.copy_(source), rounds) / 1e6,
    }


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that ``torch.empty`` and its like return is NaN: what is not written cannot pass for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def error(result: Tensor, truth: Tensor) -> float:
    """Relative to the truth's norm; NaN where the result is not finite."""
    return float((result.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph: the result is replayed into one tensor. On the CPU the call itself."""
    if DRY_RUN:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def environment() -> dict[str, Any]:
    """Device, versions, and clocks as found."""
    found: dict[str, Any] = {
        "device": "interpreter" if DRY_RUN else torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "moesaic": version("moesaic"),
        },
    }
    if not DRY_RUN:
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True)
        found["nvidia_smi"] = {query: said.stdout.decode().strip()}
        found["cuda"] = torch.version.cuda
    return found


def verdict(what: str, aim: float, measured: list[float], at_least: bool = True) -> dict[str, Any]:
    """A row of the table of aims: the worst that was measured, and whether that is as it should be."""
    worst = min(measured) if at_least else max(measured)
    return {"what": what, "aim": aim, "worst": worst, "met": worst >= aim if at_least else worst <= aim}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one table; a column for every name that any of them has."""
    table = Table(title=title)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        table.add_column(column, justify="right" if isinstance(rows[0].get(column), float) else "left")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=180).print(table)


def save(name: str, record: dict[str, Any]) -> None:
    """To ``benchmarks/results/NAME_DEVICE.json``; nowhere in a dry run, which has measured nothing."""
    if DRY_RUN:
        print("dry run: nothing saved")
        return
    slug = "_".join(torch.cuda.get_device_name().lower().split())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}_{slug}.json").write_text(json.dumps(environment() | record, indent=1) + "\n")
