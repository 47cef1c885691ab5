"""A process that measures one task after another and prints each row; ``benchmarks.gpu`` starts it.

Lines that begin with a control character are for that command: a task begins, a row, a task has ended.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from benchmarks.gpu import checks, common, layer, one_pass, others, products, sweep, warps
from benchmarks.gpu.common import DRY_RUN
from benchmarks.gpu.shapes import SHAPES, Shape

BEGIN, ROW, END = "\x01begin ", "\x01row ", "\x01end "
# A process whose GPU has failed ends with it; another carries on.
LOST = 75


class Task(NamedTuple):
    """What is measured, of which shape, tokens and routing; ``seconds`` are for tasks that can go on for long."""

    what: str
    shape: str = ""
    T: int = 0
    routing: str = ""
    seconds: float = 0


def run(task: Task, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The rows of a task. One that fails ends with a row that says why, and holds what was measured before."""
    row: dict[str, Any] = {"what": task.what}
    if task.shape:
        row |= {"shape": task.shape, "T": task.T, "routing": task.routing}
    start = time.monotonic()
    try:
        yield from _rows(row, task, ceilings)
    except Exception as failure:
        yield row | {"failed": f"{type(failure).__name__}: {failure}"[:400], "seconds": time.monotonic() - start}
        if not DRY_RUN and not isinstance(failure, torch.OutOfMemoryError):
            torch.cuda.synchronize()  # raises where the GPU itself has failed
    if not DRY_RUN:
        torch.cuda.empty_cache()


def _rows(row: dict[str, Any], task: Task, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    start = time.monotonic()
    match task.what:
        case "ceilings":
            row |= common.environment() | common.ceilings()
        case "one pass":
            one_pass.measure(row)
        case "sweep":
            yield from sweep.rows(_shape(task), task.T, task.routing, ceilings, task.seconds)
            return
        case "others":
            yield from others.rows(_shape(task), task.T, task.routing)
            return
        case _:
            parts = {"layer": layer, "products": products, "checks": checks, "warps": warps}
            parts[task.what].measure(row, _shape(task), task.T, task.routing)
    yield row | {"seconds": time.monotonic() - start}


def _shape(task: Task) -> Shape:
    return next(shape for shape in SHAPES if shape.name == task.shape)


def main() -> None:
    common.require_gpu()
    arguments = json.loads(next(a for a in sys.argv[1:] if a != "--dry-run"))
    ceilings = arguments["ceilings"]
    for number, task in arguments["tasks"]:
        print(f"{BEGIN}{number}", flush=True)
        try:
            for row in run(Task(*task), ceilings):
                if row["what"] == "ceilings":
                    ceilings = row
                print(f"{ROW}{json.dumps(row)}", flush=True)
        except torch.AcceleratorError:
            raise SystemExit(LOST) from None
        print(f"{END}{number}", flush=True)


if __name__ == "__main__":
    main()
