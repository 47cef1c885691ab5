"""Registers, spills, shared memory and matrix instructions of every Triton kernel in its default configurations.

Compiles ahead of time for GPUs that need not be there: the functions that launch kernels run on tensors without memory,
and each launch is compiled instead. ptxas and cuobjdump come with triton.

    python benchmarks/gpu/compile_table.py [--capabilities 8.0 9.0] [--dtypes bfloat16] [--forms silu] [--json FILE]
    python benchmarks/gpu/compile_table.py --sample [--json FILE]
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
from moesaic.ops.experts_mlp.problem import Problem, Projection, Target, Targets, Wanted
from moesaic.ops.grouped_mm.impl import triton as grouped_mm
from moesaic.ops.triton import device

# Bytes of shared memory that a block can have.
SHARED_LIMITS = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "10.0": 227 << 10}
# Qwen3-30B-A3B's experts; a few, some and many rows each.
E, K, D, F = 128, 8, 2048, 768
TOKENS = {"few": 64, "some": 512, "many": 32768}
CAPABILITIES = ("8.0", "9.0", "10.0")
DTYPES = ("bfloat16", "float16", "float32")
_SMS = 132
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Form:
    """What the experts compute."""

    activation: str
    is_gated: bool = True
    is_biased: bool = False


# Of the activations gelu needs the most registers, clamped_swiglu the most of those of known models.
FORMS = {
    "silu": Form("silu"),
    "silu, biases": Form("silu", is_biased=True),
    "silu, no gate": Form("silu", is_gated=False),
    "gelu, biases": Form("gelu", is_biased=True),
    "clamped_swiglu": Form("clamped_swiglu"),
    "clamped_swiglu, biases": Form("clamped_swiglu", is_biased=True),
}
# For one GPU every form in the largest blocks, and all blocks. For the others the largest blocks: in bf16 of the usual
# form, in the other dtypes of the one that needs the most registers.
USUAL = {"many": ("silu",)}
GREEDY = {"many": ("gelu, biases",)}
SAMPLE = (
    ("9.0", "bfloat16", {"few": ("silu",), "some": ("silu",), "many": tuple(FORMS)}),
    ("8.0", "bfloat16", USUAL),
    ("10.0", "bfloat16", USUAL),
    ("8.0", "float16", GREEDY),
    ("10.0", "float32", GREEDY),
)


@dataclass(frozen=True)
class Options:
    """What to compile."""

    capabilities: Annotated[tuple[str, ...], tyro.conf.arg(help="compute capabilities")] = CAPABILITIES
    dtypes: tuple[str, ...] = DTYPES
    forms: Annotated[tuple[str, ...], tyro.conf.arg(help="of the experts")] = tuple(FORMS)
    sample: Annotated[bool, tyro.conf.arg(help="instead: every form, dtype and GPU, not with each other")] = False
    jobs: Annotated[int, tyro.conf.arg(help="processes")] = 2
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


@dataclass(frozen=True)
class Row:
    """A kernel as compiled."""

    kernel: str
    capability: str
    dtype: str
    rows: str
    form: str
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
        # Kernels are kept by device: a process can compile for several.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(capability: str, dtype: torch.dtype, forms: dict[str, tuple[str, ...]]) -> list[Row]:
    """Every kernel that both operators launch in both passes, for the forms of each number of rows."""
    major, minor = map(int, capability.split("."))
    driver.set_active(_Target((major, minor)))
    device.describe = lambda _: device.nvidia((major, minor), _SMS)
    compiled: dict[int, tuple[str, str, str, Any, dict[str, Any]]] = {}
    run, rows, form = JITFunction.run, "", ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(id(kernel), (self.fn.__name__, rows, form, kernel, options))
        return kernel

    JITFunction.run = compile_only
    try:
        for rows in forms:
            for form in forms[rows]:
                _launch_experts(TOKENS[rows], dtype, FORMS[form])
            _launch_products(TOKENS[rows] * K, dtype)
    finally:
        JITFunction.run = run
    return [_describe(capability, dtype, *entry) for entry in compiled.values()]


def _launch_experts(tokens: int, dtype: torch.dtype, form: Form) -> None:

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, weights = empty(tokens, K, dtype=torch.int64), empty(tokens, K, dtype=torch.float32)
    up = [Projection(empty(E, D, F), empty(E, F) if form.is_biased else None) for _ in range(1 + form.is_gated)]
    problem = Problem(empty(tokens, D), ids, weights, tuple(up), Projection(empty(E, F, D)), form.activation)
    experts_mlp.forward(problem, False)
    pre = experts_mlp.forward(problem, True).hidden
    grad = empty(tokens, D)

    def targets(projection: Projection, into: torch.Tensor | None) -> Targets:
        bias = projection.bias
        return Targets(Target(projection.weight, into), None if bias is None else Target(bias))

    for adds in (False, True):
        *ups, down = (
            targets(p, empty(*p.weight.shape, dtype=torch.float32) if adds else None) for p in (*up, problem.down)
        )
        experts_mlp.backward(grad, problem, pre, Wanted(True, True, tuple(ups), down))


def _launch_products(num_rows: int, dtype: torch.dtype) -> None:
    x, grad = (torch.empty(num_rows, n, dtype=dtype, device="meta") for n in (D, F))
    w = torch.empty(E, D, F, dtype=dtype, device="meta")
    sizes = torch.empty(1, E, dtype=torch.int64, device="meta")
    grouped_mm.forward(x, w, sizes, dtype)
    grouped_mm.forward(grad, w.mT, sizes, dtype)
    grouped_mm.weight_grad(x, grad, sizes, E)
    grouped_mm.weight_grad_into(w.float(), x, grad, sizes)


def _describe(
    capability: str, dtype: torch.dtype, name: str, rows: str, form: str, kernel: Any, options: dict[str, Any]
) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert used, usage
    blocks = "x".join(str(options[n]) for n in ("BM", "BN", "BK") if n in options)
    metadata, ptx = kernel.metadata, kernel.asm["ptx"]
    return Row(
        name.strip("_"),
        capability,
        str(dtype).removeprefix("torch."),
        rows,
        form if "ACT" in options else "",
        f"{blocks}, {metadata.num_warps} warps, {metadata.num_stages} stages" if blocks else "",
        int(used[1]),
        int(used[2]) + int(used[3]),
        metadata.shared,
        next((label for label, code in _INSTRUCTIONS.items() if code in ptx), ""),
        "cp.async.bulk.tensor" in ptx,
    )


_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}


def _task(args: tuple[str, str, dict[str, tuple[str, ...]]]) -> list[Row]:
    capability, dtype, forms = args
    return compile_launches(capability, getattr(torch, dtype), forms)


def main(options: Options) -> None:
    everything = [(c, d, dict.fromkeys(TOKENS, options.forms)) for c in options.capabilities for d in options.dtypes]
    tasks = SAMPLE if options.sample else everything
    # Spawned, since torch has threads.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        rows = list(dict.fromkeys(row for found in pool.map(_task, tasks) for row in found))
    table = Table(title=f"Triton kernels as compiled by triton {triton.__version__}")
    columns = (
        "kernel",
        "for",
        "dtype",
        "rows",
        "form",
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
