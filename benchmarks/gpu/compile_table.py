"""Registers, spills, shared memory and matrix instructions of every Triton kernel in its default configurations.

Compiles ahead of time for GPUs that need not be there: the functions that launch kernels run on tensors without memory,
and each launch is compiled instead. ptxas and the disassembler come with triton.

    python benchmarks/gpu/compile_table.py [--capabilities 8.0 9.0 10.0] [--dtypes bfloat16] [--json FILE]
"""

import json
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import tyro
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moesaic.ops.experts_mlp.impl import triton as experts_mlp
from moesaic.ops.experts_mlp.problem import MainGrads, Needs, Problem
from moesaic.ops.grouped_mm.impl import triton as grouped_mm
from moesaic.ops.triton import device

# Bytes of shared memory that a block can have.
SHARED_LIMITS = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "10.0": 227 << 10}
# Qwen3-30B-A3B's experts; a few, some and many rows each.
E, K, D, F = 128, 8, 2048, 768
TOKENS = {"few": 64, "some": 512, "many": 32768}
_SMS = 132
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Options:
    """What to compile."""

    capabilities: Annotated[tuple[str, ...], tyro.conf.arg(help="compute capabilities")] = ("8.0", "9.0", "10.0")
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    activations: Annotated[tuple[str, ...], tyro.conf.arg(help="all but silu with biases")] = ("silu", "gelu")
    jobs: Annotated[int, tyro.conf.arg(help="processes")] = 2
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


@dataclass(frozen=True)
class Row:
    """A kernel as compiled."""

    kernel: str
    capability: str
    dtype: str
    rows: str
    activation: str
    config: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str
    has_tma: bool


class _Target:
    """Stands in for a GPU's driver."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(capability: str, dtype: torch.dtype, activation: str) -> list[Row]:
    """Every kernel that a forward and a backward pass of both operators launch."""
    major, minor = map(int, capability.split("."))
    driver.set_active(_Target((major, minor)))
    device.describe = lambda _: device.nvidia((major, minor), _SMS)
    compiled: dict[int, tuple[str, str, Any, dict[str, Any]]] = {}
    run, rows = JITFunction.run, ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(id(kernel), (self.fn.__name__, rows, kernel, options))
        return kernel

    JITFunction.run = compile_only
    try:
        for rows, tokens in TOKENS.items():  # noqa: B007 -- read by compile_only
            _launch_experts(tokens, dtype, activation)
            _launch_products(tokens * K, dtype)
    finally:
        JITFunction.run = run
    return [_describe(capability, dtype, activation, *entry) for entry in compiled.values()]


def _launch_experts(tokens: int, dtype: torch.dtype, activation: str) -> None:
    is_biased = activation != "silu"

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, weights = empty(tokens, K, dtype=torch.int64), empty(tokens, K, dtype=torch.float32)
    b1, b3 = (empty(E, F), empty(E, F)) if is_biased else (None, None)
    problem = Problem(
        empty(tokens, D), ids, weights, empty(E, D, F), empty(E, D, F), empty(E, F, D), b1, b3, activation
    )
    _, h1, h3 = experts_mlp.forward(problem, True)
    assert h1 is not None
    grad, biases = empty(tokens, D), (is_biased, is_biased)
    experts_mlp.backward(grad, problem, h1, h3, Needs(*[True] * 5, *biases))
    into = MainGrads(*(empty(*w.shape, dtype=torch.float32) for w in (problem.w1_EDF, problem.w1_EDF, problem.w2_EFD)))
    experts_mlp.backward(grad, problem, h1, h3, Needs(True, True, False, False, False, *biases), into)


def _launch_products(num_rows: int, dtype: torch.dtype) -> None:
    x, grad = (torch.empty(num_rows, n, dtype=dtype, device="meta") for n in (D, F))
    w = torch.empty(E, D, F, dtype=dtype, device="meta")
    sizes = torch.empty(1, E, dtype=torch.int64, device="meta")
    grouped_mm.forward(x, w, sizes, dtype)
    grouped_mm.forward(grad, w.mT, sizes, dtype)
    grouped_mm.weight_grad(x, grad, sizes, E)
    grouped_mm.weight_grad_into(w.float(), x, grad, sizes)


def _describe(
    capability: str, dtype: torch.dtype, activation: str, name: str, rows: str, kernel: Any, options: dict[str, Any]
) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert used, usage
    blocks = "x".join(str(options[n]) for n in ("BM", "BN", "BK") if n in options)
    metadata = kernel.metadata
    return Row(
        name.strip("_"),
        capability,
        str(dtype).removeprefix("torch."),
        rows,
        options.get("ACT", activation if "ACT" in options else ""),
        f"{blocks}, {metadata.num_warps} warps, {metadata.num_stages} stages" if blocks else "",
        int(used[1]),
        int(used[2]) + int(used[3]),
        metadata.shared,
        next((label for label, code in _INSTRUCTIONS.items() if re.search(code, sass)), ""),
        "UTMALDG" in sass,
    )


_INSTRUCTIONS = {"wgmma": r"\bHGMMA", "tcgen05": r"\bUTC[A-Z]*MMA", "mma": r"\bHMMA"}


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _task(args: tuple[str, str, str]) -> list[Row]:
    capability, dtype, activation = args
    return compile_launches(capability, getattr(torch, dtype), activation)


def main(options: Options) -> None:
    tasks = [(c, d, a) for c in options.capabilities for d in options.dtypes for a in options.activations]
    # A process of its own each, for the stand-in driver stays; spawned, since torch has threads.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = list(dict.fromkeys(row for found in pool.map(_task, tasks) for row in found))
    table = Table(title=f"Triton kernels as compiled by triton {triton.__version__}")
    columns = (
        "kernel",
        "for",
        "dtype",
        "rows",
        "act",
        "blocks",
        "registers",
        "spilled",
        "shared",
        "instruction",
        "TMA",
    )
    for column in columns:
        table.add_column(column, justify="right" if column in ("registers", "spilled", "shared") else "left")
    for row in rows:
        table.add_row(*(str(v) for v in list(asdict(row).values())[:-1]), "yes" if row.has_tma else "")
    Console(width=150).print(table)
    worst = [row for row in rows if row.spilled_bytes or row.shared_bytes > SHARED_LIMITS[row.capability]]
    print(f"{len(rows)} kernels, {len(worst)} that spill or do not fit")
    if options.json:
        record = {"what": "Triton kernels ahead of time", "versions": {"triton": triton.__version__}}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
