"""Is anything slower than its peers on CPU? Layer and operator against the best of them, in interleaved pairs.

The layer against each implementation of transformers' experts, in forward passes, forward and backward, and steps of a
few tokens; `grouped_mm` against `torch.nn.functional.grouped_mm`, forward, and forward and backward. All calls leave
`impl=None`. A row's ratio is the median over pairs of the peer's time by ours, of the peer that is nearest.
Rows in which our choice is torch's own product are counted apart.

    python benchmarks/peers_cpu.py --json benchmarks/results/peers_cpu_NAME.json [--rounds 15] [--threads 1 2]

It prints each row when it has it, and adds it to the file. Rows that the file has are not measured again, so it can be
stopped, and run in pieces (`--shapes`, `--threads`, `--allocators`, `--dtypes`, `--parts`). `--summary` only reads.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import tyro
from as_they_come import QUICK
from experts_cpu import GROUPED, SHAPES, Shape, make_block, make_layers, step
from grouped_mm_cpu import WARM, processor
from torch import Tensor, nn

from moesaic import grouped_mm
from moesaic.ops.choices import Case, shape_on_cpu
from moesaic.ops.fastest import in_force

OURS, OPERATOR_PEER = "moesaic", "F.grouped_mm"
FEW = (1, 4, 16)  # tokens of a step
LEAST = 0.97
Part = Literal["layer", "steps", "operator"]


@dataclass(frozen=True)
class Options:
    json: Annotated[Path, tyro.conf.arg(help="where the rows are kept")]
    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="pairs; each is one call of ours and one of the peer")] = 15
    threads: Annotated[tuple[int, ...], tyro.conf.arg(help="torch threads")] = (1, 2)
    allocators: Annotated[
        tuple[Literal["default", "warm"], ...],
        tyro.conf.arg(help="warm: the C library keeps freed memory, which favours the peers"),
    ] = ("default", "warm")
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes")] = tuple(s.name for s in SHAPES)
    dtypes: Annotated[tuple[Literal["float32", "bfloat16"], ...], tyro.conf.arg(help="dtypes")] = (
        "float32",
        "bfloat16",
    )
    parts: Annotated[tuple[Part, ...], tyro.conf.arg(help="what to measure")] = ("layer", "steps", "operator")
    summary: Annotated[bool, tyro.conf.arg(help="measure nothing, and sum up what the file has")] = False
    here: Annotated[bool, tyro.conf.arg(help="in this process, whatever allocator it has")] = False


@dataclass(frozen=True)
class Race:
    """Calls of ours and of the peers that do the same; and whether ours is torch's product by choice."""

    what: str
    calls: dict[str, Callable[[], Any]]
    handed_over: bool


def paired(race: Race, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Medians of the ratios of pairs, by peer."""

    def seconds(call: Callable[[], Any]) -> float:
        start = clock()
        call()
        return clock() - start

    ours, seconds_of = race.calls[OURS], {name: list[float]() for name in race.calls}
    ratios: dict[str, list[float]] = {name: [] for name in race.calls if name != OURS}
    for warm_up in [True] + [False] * rounds:
        for name, found in ratios.items():
            pair = seconds(ours), seconds(race.calls[name])
            if not warm_up:
                found.append(pair[1] / pair[0])
                seconds_of[OURS].append(pair[0])
                seconds_of[name].append(pair[1])
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    nearest = min(medians, key=lambda name: medians[name])
    quarters = statistics.quantiles(ratios[nearest], n=4) if rounds > 1 else ratios[nearest] * 3
    return {
        "peer": nearest,
        "ratio": medians[nearest],
        "quartiles": [quarters[0], quarters[2]],
        "ratios": medians,
        "seconds": {name: statistics.median(found) for name, found in seconds_of.items()},
    }


def is_handed_over(operators: tuple[str, ...], dtype: torch.dtype, rows: int, groups: int) -> bool:
    return all(in_force()[Case(name, dtype, shape_on_cpu(rows, groups))] == "torch" for name in operators)


def of_layer(shape: Shape, dtype: torch.dtype) -> Iterator[Race]:
    layers = {name: layer for name, layer in make_layers(shape, dtype).items() if name in (OURS, GROUPED)}
    x = torch.randn(1, shape.tokens, shape.D, dtype=dtype)
    eager = make_block(shape, dtype, "eager")
    eager.load_state_dict(layers[GROUPED].state_dict())
    rows = shape.tokens * shape.K

    def forward(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(x)

    # The backward pass of `eager` is quadratic in the number of experts.
    for what, run, peers, operators in (
        ("layer, forward", forward, layers | {"eager": eager}, ("experts_mlp_inference",)),
        ("layer, forward+backward", lambda layer: step(layer, x), layers, ("experts_mlp", "experts_mlp_backward")),
    ):
        calls = {name: (lambda layer=layer, run=run: run(layer)) for name, layer in peers.items()}
        yield Race(what, calls, is_handed_over(operators, dtype, rows, shape.E))


def of_steps(shape: Shape, dtype: torch.dtype) -> Iterator[Race]:
    blocks = {name: make_block(shape, dtype, name) for name in ("eager", "grouped_mm", "batched_mm")}
    first = blocks[GROUPED]
    for block in blocks.values():
        block.experts.gate_up_proj, block.experts.down_proj = first.experts.gate_up_proj, first.experts.down_proj
        block.gate = first.gate
    moe = make_layers(shape, dtype)[OURS]
    for tokens in FEW:
        # Others at every step, or a cache would hold the weights.
        xs = torch.randn(8, 1, tokens, shape.D, dtype=dtype)
        layers = {OURS: moe} | {name: block for name, block in blocks.items() if name != "batched_mm" or tokens == 1}

        def steps(layer: nn.Module, xs: Tensor = xs) -> list[Tensor]:
            with torch.no_grad():
                return [layer(x) for x in xs]

        calls = {name: (lambda layer=layer, steps=steps: steps(layer)) for name, layer in layers.items()}
        over = is_handed_over(("experts_mlp_inference",), dtype, tokens * shape.K, shape.E)
        yield Race(f"layer, {tokens} token{'s'[: tokens != 1]}", calls, over)


def of_operator(shape: Shape, dtype: torch.dtype) -> Iterator[Race]:
    rows = shape.tokens * shape.K
    x = torch.randn(rows, shape.D, dtype=dtype).requires_grad_()
    w = (torch.randn(shape.E, shape.D, shape.F) * shape.D**-0.5).to(dtype).requires_grad_()
    grad = torch.randn(rows, shape.F, dtype=dtype)
    sizes = torch.randint(shape.E, (rows,)).bincount(minlength=shape.E)
    ends = sizes.cumsum(0).to(torch.int32)
    peer = torch.nn.functional.grouped_mm
    products = {OURS: lambda: grouped_mm(x, w, sizes), OPERATOR_PEER: lambda: peer(x, w, offs=ends)}

    def forward(product: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return product()

    def both(product: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(product(), (x, w), grad)

    trained = ("grouped_mm", "grouped_mm_input_grad", "grouped_mm_weight_grad")
    for what, run, operators in (("forward", forward, trained[:1]), ("forward+backward", both, trained)):
        calls = {name: (lambda product=product, run=run: run(product)) for name, product in products.items()}
        yield Race(f"grouped_mm, {what}", calls, is_handed_over(operators, dtype, rows, shape.E))


PARTS: dict[str, Callable[[Shape, torch.dtype], Iterator[Race]]] = {
    "layer": of_layer,
    "steps": of_steps,
    "operator": of_operator,
}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("allocator", "threads", "shape", "dtype", "what"))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"rows": []}


def write(options: Options, rows: list[dict[str, Any]]) -> None:
    record = {
        "what": "moesaic against its peers on CPU, in interleaved pairs",
        "processor": processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    fresh = options.json.with_suffix(".tmp")
    fresh.write_text(json.dumps(record, indent=1) + "\n")
    fresh.replace(options.json)


def measure(options: Options) -> None:
    (allocator,) = options.allocators
    rows = read(options.json)["rows"]
    known = {key(row) for row in rows}
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        for shape in (shape for shape in SHAPES if shape.name in options.shapes):
            for name in options.dtypes:
                for part in options.parts:
                    torch.manual_seed(0)
                    for race in PARTS[part](shape, getattr(torch, name)):
                        row: dict[str, Any] = {
                            "allocator": allocator,
                            "threads": threads,
                            "shape": shape.name,
                            "dtype": name,
                            "what": race.what,
                        }
                        if key(row) in known:
                            continue
                        row |= {"rounds": options.rounds, "handed_over": race.handed_over}
                        row |= paired(race, options.rounds, clock)
                        rows.append(row)
                        write(options, rows)
                        print(said(row), flush=True)


def said(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    over = ", handed over" if row["handed_over"] else ""
    where = f"{row['shape']:10}{row['dtype']:9}{row['threads']} thread(s) {row['allocator']:8}{row['what']:29}"
    return f"{where}{row['ratio']:6.2f}x of {row['peer']} ({low:.2f} to {high:.2f}{over})"


def summarize(rows: list[dict[str, Any]]) -> str:
    """Least, geometric mean and what is too low, by dtype; rows that are handed over apart."""
    lines = []
    for over in (False, True):
        for dtype in ("float32", "bfloat16"):
            of = [row for row in rows if row["dtype"] == dtype and row["handed_over"] == over]
            if not of:
                continue
            ratios = [row["ratio"] for row in of]
            mean = math.exp(statistics.mean(map(math.log, ratios)))
            low = [row for row in of if row["ratio"] < LEAST]
            title = f"{dtype}{', handed over' if over else ''}"
            lines.append(
                f"{title}: {len(of)} rows, least {min(ratios):.2f}x, geometric mean {mean:.2f}x, "
                f"{len(low)} below {LEAST}x"
            )
            lines += [f"  {said(row)}" for row in low]
    return "\n".join(lines)


def main(options: Options) -> None:
    if options.quick:
        shapes, dtypes, parts = ("128 finer",), ("bfloat16",), ("operator",)
        options = replace(options, rounds=3, threads=options.threads[:1], shapes=shapes, dtypes=dtypes, parts=parts)
        options = replace(options, allocators=options.allocators[:1])
    if options.here:
        return measure(options)
    # The C library reads its settings when a process starts.
    for allocator in () if options.summary else options.allocators:
        settings = WARM if allocator == "warm" else {}
        arguments = [sys.executable, *sys.argv, "--here", "--allocators", allocator]
        subprocess.run(arguments, env=os.environ | settings, check=True)
    print(f"\n{processor()['model']}, all that {options.json} has:\n{summarize(read(options.json)['rows'])}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
