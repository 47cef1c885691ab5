"""Where the CPU kernels are faster than torch's products: what `moesaic/ops/fastest.py` goes by on this processor.

Time of `impl="torch"` over that of `impl="cpu"` by the average of rows a group, forward alone and with the backward
pass, for `experts_mlp` (SwiGLU) and `grouped_mm`. Both run interleaved in one process, and medians are compared.

    python benchmarks/fastest_cpu.py [--quick] [--rounds 3] [--threads 1] [--json benchmarks/results/NAME.json]

Where a processor has no bf16 instructions torch takes seconds for what the kernels do in a tenth of one: measure bf16
by itself then (`--dtypes bfloat16 --rounds 1 --rows 1 16 32`). Rows of a file that exists are kept, but for those that
are measured again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from as_they_come import QUICK, Results
from experts_cpu import medians
from grouped_mm_cpu import Machine, processor
from rich.console import Console
from rich.table import Table

from moesaic import experts_mlp, grouped_mm
from moesaic.ops.processor import has_amx

# Experts, model dim, hidden dim.
SHAPES = {"8 wide": (8, 1024, 1792), "64 fine": (64, 1024, 512), "128 finer": (128, 512, 256)}
ROWS = (1, 4, 8, 16, 32, 64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; both implementations run once a round")] = 3
    threads: Annotated[int, tyro.conf.arg(help="torch threads")] = 1
    rows: Annotated[tuple[int, ...], tyro.conf.arg(help="rows a group")] = ROWS
    dtypes: Annotated[tuple[Literal["float32", "bfloat16"], ...], tyro.conf.arg(help="of the operands")] = tuple(DTYPES)
    experts: Annotated[tuple[str, ...], tyro.conf.arg(help=f"some of {tuple(SHAPES)}")] = tuple(SHAPES)
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


def passes(name: str, rows: int, dtype: torch.dtype) -> dict[str, Callable[[str], object]]:
    """What is timed, by name: functions of the implementation."""
    E, D, F = SHAPES[name]
    T = rows * E
    w1, w3, w2 = (
        (torch.randn(shape) * shape[1] ** -0.5).to(dtype).requires_grad_()
        for shape in ((E, D, F), (E, D, F), (E, F, D))
    )
    x = torch.randn(T, D).to(dtype).requires_grad_()
    ids, weights = (torch.randperm(T) % E)[:, None], torch.rand(T, 1)
    sizes = torch.full((E,), rows, dtype=torch.int32)
    gz, gy = torch.randn(T, D).to(dtype), torch.randn(T, F).to(dtype)

    def experts(impl: str) -> torch.Tensor:
        return experts_mlp(x, ids, weights, w1, w3, w2, impl=impl)

    def product(impl: str) -> torch.Tensor:
        return grouped_mm(x, w1, sizes, impl=impl)

    return {
        "experts_mlp, forward": torch.no_grad()(experts),
        "experts_mlp, forward+backward": lambda impl: torch.autograd.grad(experts(impl), (x, w1, w3, w2), gz),
        "grouped_mm, forward": torch.no_grad()(product),
        "grouped_mm, forward+backward": lambda impl: torch.autograd.grad(product(impl), (x, w1), gy),
    }


def as_text(row: dict[str, Any]) -> str:
    return f"{row['experts']}, {row['dtype']}, {row['what']}, {row['rows']} rows a group: {row['ratio']:.2f}x"


def merged(before: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file, with those that were measured now in their place or after them."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("experts", "dtype", "what", "rows"))

    return [*{key(row): row for row in (*before, *found)}.values()]


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, rounds=1, rows=(1, 16, 64), experts=("128 finer",))
    torch.set_num_threads(options.threads)
    machine = Machine(options.threads)
    table = Table(title=f"Time of torch's products over that of the CPU kernels, {options.threads} thread(s)")
    for column in ("experts", "dtype", "what", *(f"{rows} rows" for rows in options.rows)):
        table.add_column(column)
    about = {"threads": options.threads, "processor": processor(), "torch": torch.__version__, "amx": has_amx()}
    before = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    with Results(options.json, about, as_text, merge=partial(merged, before)) as results:
        for name in options.experts:
            for precision in options.dtypes:
                for rows in options.rows:
                    for what, run in passes(name, rows, DTYPES[precision]).items():
                        calls = {impl: partial(run, impl) for impl in ("cpu", "torch")}
                        seconds = medians(calls, machine, options.rounds)
                        key = {"experts": name, "dtype": precision, "what": what, "rows": rows}
                        ratio = seconds["torch"] / seconds["cpu"]
                        results.add(key | {"rounds": options.rounds, "seconds": seconds, "ratio": ratio})
    ratios: dict[tuple[str, ...], dict[int, str]] = {}
    for row in results.rows:
        line = ratios.setdefault((row["experts"], row["dtype"], row["what"]), {})
        line[row["rows"]] = f"{row['ratio']:.2f}x"
    for line, by_rows in ratios.items():
        table.add_row(*line, *(by_rows.get(rows, "") for rows in options.rows))
    Console(width=140).print(table)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
