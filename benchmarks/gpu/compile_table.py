"""Registers, spills, shared memory and matrix instructions of every Triton kernel in its default configurations.

Compiles ahead of time and needs no GPU; ptxas and cuobjdump come with triton.

    python -m benchmarks.gpu.compile_table [--capabilities 8.0 9.0] [--dtypes bfloat16] [--forms silu] [--json FILE]
    python -m benchmarks.gpu.compile_table --sample [--json FILE]
    python -m benchmarks.gpu.compile_table --capabilities 9.0 --dtypes bfloat16 --forms silu --loops
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from benchmarks.gpu import launches
from benchmarks.gpu.launches import Form, Sizes
from rich.console import Console
from rich.table import Table

# Bytes of shared memory that a block can have.
SHARED_LIMITS = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "10.0": 227 << 10}
# Qwen3-30B-A3B's experts; a few, some and many rows each.
SIZES = {name: Sizes(T, K=8, E=128, D=2048, F=768) for name, T in (("few", 64), ("some", 512), ("many", 32768))}
CAPABILITIES = ("8.0", "9.0", "10.0")
DTYPES = ("bfloat16", "float16", "float32")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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
    # Of the whole kernel, and of the loop over the sum: all instructions, and those that multiply.
    instructions: int = 0
    loop_instructions: int = 0
    loop_products: int = 0


def compile_launches(
    capability: str, dtype: torch.dtype, forms: dict[str, tuple[str, ...]], loops: bool = False
) -> list[Row]:
    """Every kernel that both operators launch in both passes, for the forms of each number of rows."""
    compiled: dict[int, tuple[str, str, str, Any, dict[str, Any]]] = {}
    rows, form = "", ""

    def take(name: str, kernel: Any, options: dict[str, Any]) -> None:
        compiled.setdefault(id(kernel), (name, rows, form, kernel, options))

    with launches.compiled_only(capability, take):
        for rows in forms:
            for form in forms[rows]:
                problem = launches.problem(SIZES[rows], dtype, FORMS[form])
                launches.experts_forward(problem)
                # The kernel in Gluon, which is off by default, is compiled where it would run.
                with mock.patch.dict(os.environ, MOESAIC_TRITON_WARPS="1"):
                    launches.experts_forward(problem)
                for main_gradients in (False, True):
                    launches.experts_backward(problem, main_gradients)
            launches.products(SIZES[rows], dtype)
    return [_describe(capability, dtype, loops, *entry) for entry in compiled.values()]


def _describe(
    capability: str,
    dtype: torch.dtype,
    loops: bool,
    name: str,
    rows: str,
    form: str,
    kernel: Any,
    options: dict[str, Any],
) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        counted = _loop(_tool("nvdisasm", "-c", file.name)) if loops else ()
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
        *counted,
    )


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _loop(assembly: str) -> tuple[int, int, int]:
    """Instructions in all, of the loop over the sum, and the products in that.

    It is the shortest innermost loop that multiplies and, unless other warps load, begins loads. A jump back without a
    condition ends none: what waits for a barrier again comes back from behind.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"^@\S+ BRA\S*.*`\((\.L_\w+)\)", line)
        if jump and labels.get(jump[1], end + 1) <= end:
            body = lines[labels[jump[1]] : end + 1]
            products = sum(re.search(r"\b(HGMMA|HMMA|UTCHMMA|FFMA)", i) is not None for i in body)
            if products:
                loops.append((labels[jump[1]], end, products, any(re.search("LDGSTS|UTMALDG", i) for i in body)))
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = [(not loads, end - start + 1, products) for start, end, products, loads in innermost]
    _, length, products = min(found, default=(False, 0, 0))
    return len(lines), length, products


_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}


def _task(args: tuple[str, str, dict[str, tuple[str, ...]], bool]) -> list[Row]:
    capability, dtype, forms, loops = args
    return compile_launches(capability, getattr(torch, dtype), forms, loops)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    known, usual = ", ".join(SHARED_LIMITS), " ".join(CAPABILITIES)
    text = f"compute capabilities, of {known} (default: {usual})"
    add("--capabilities", nargs="+", default=CAPABILITIES, choices=SHARED_LIMITS, metavar="X.Y", help=text)
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    add("--forms", nargs="+", default=tuple(FORMS), choices=FORMS, help="of the experts")
    add("--sample", action="store_true", help="instead: every form, dtype and GPU, not with each other")
    add("--loops", action="store_true", help="also count instructions: of each kernel, and of its loop over the sum")
    add("--jobs", type=int, default=2, help="processes (default: 2)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    everything = [(c, d, dict.fromkeys(SIZES, options.forms)) for c in options.capabilities for d in options.dtypes]
    tasks = SAMPLE if options.sample else everything
    # Spawned, since torch has threads.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(_task, [(*task, options.loops) for task in tasks])
        rows = list(dict.fromkeys(row for found in results for row in found))
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
        *(("instructions", "products in loop") if options.loops else ()),
    )
    for column in columns:
        table.add_column(column, justify="right" if column in ("registers", "spilled", "shared") else "left")
    for row in rows:
        *cells, instructions, length, products = asdict(row).values()
        counted = [str(instructions), f"{products} of {length}" if length else ""] if options.loops else []
        table.add_row(*(str(v) for v in cells[:-1]), "yes" if row.has_tma else "", *counted)
    Console(width=150).print(table)
    worst = [row for row in rows if row.spilled_bytes or row.shared_bytes > SHARED_LIMITS[row.capability]]
    print(f"{len(rows)} kernels, {len(worst)} that spill or do not fit")
    if options.json:
        record = {"what": "Triton kernels ahead of time", "versions": {"triton": triton.__version__}}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main(_options())
