"""What the GPU benchmarks share: timing, ceilings, poison, errors, CUDA graphs, versions, tables.

With ``--dry-run`` everything runs at tiny sizes on the CPU, the kernels in Triton's interpreter: it shows that a script
works, and its times mean nothing.
"""

import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
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
ROOT = Path(__file__).parents[2]
_SECONDS_OF_ROUNDS = 0.4


def require_gpu() -> None:
    if not DRY_RUN and not torch.cuda.is_available():
        raise SystemExit("no GPU here: run on one, or with --dry-run to see that the script works")


def milliseconds(run: Callable[[], Any], least: int = 5, most: int = 20) -> float:
    """Median time of a call, the L2 cache filled with other things before each; fewer calls of what takes long."""
    if DRY_RUN:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    run()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)

    def timed(rounds: int) -> list[float]:
        pairs = []
        for _ in range(rounds):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    first = timed(1)[0]
    return statistics.median(timed(min(most, max(least, int(_SECONDS_OF_ROUNDS * 1e3 / max(first, 1e-3))))))


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large bf16 product and GB/s, read and written, of a large copy."""
    n = 64 if DRY_RUN else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty((1 if DRY_RUN else 1024) << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "matmul TFLOP/s": 2 * n**3 / milliseconds(lambda: a @ b) / 1e9,
        "copy GB/s": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6,
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


@contextlib.contextmanager
def without_sync() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    if DRY_RUN:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def moesaic_version() -> str:
    """Of the package, or what the checkout says of itself."""
    try:
        return version("moesaic")
    except PackageNotFoundError:
        found = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        return f"{found[1] if found else 'unknown'}, a checkout"


def environment() -> dict[str, Any]:
    """Device, versions, and clocks as found."""
    found: dict[str, Any] = {
        "device": "interpreter" if DRY_RUN else torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "moesaic": moesaic_version(),
        },
    }
    if not DRY_RUN:
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
        with contextlib.suppress(OSError):
            said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True)
            found["nvidia_smi"] = {query: said.stdout.decode().strip()}
        found["cuda"] = torch.version.cuda
    return found


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one table; a column for every name that any of them has."""
    table = Table(title=title)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        numbers = any(isinstance(row.get(column), float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=180).print(table)
