"""All that is measured on a GPU, in one command that ends within its budget of seconds.

What is worth most comes first: kernels are compiled by many processes, then come the MoE layers of known models, each
row checked before it is timed, then where the time goes and other configurations of the worst kernel, other people's
layers where they are installed, and a pass under compute-sanitizer's memcheck. After every row the results are written
to DIR/gpu_DEVICE.json. A task that hangs or loses the GPU costs its own row: another process carries on. What there was
no time for is named. It ends with a table of what was aimed at, and fails if a row has failed; not if an aim is missed.
"""

import argparse
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import common, warm, worker
from benchmarks.gpu.aims import verdicts
from benchmarks.gpu.common import DRY_RUN
from benchmarks.gpu.launches import Sizes
from benchmarks.gpu.one_pass import SHAPE as ONE_PASS
from benchmarks.gpu.one_pass import TOKENS as TOKENS_OF_ONE_PASS
from benchmarks.gpu.shapes import ROUTINGS, SHAPES, TOKENS
from benchmarks.gpu.worker import Task

START = time.monotonic()
# Of the budget: for tables and the last file, at most for compiling, at least for a row.
_ENDING, _WARMING, _ROW = 5, 0.25, 12
# Seconds after which a task is taken to hang.
_HANGS = 120
# Rows whose failure is no fault of ours, costs time only, or is of what is off by default.
_FORGIVEN = ("others", "sweep", "warm", "warps")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [shape.name for shape in SHAPES]
    add = parser.add_argument
    add("--budget", type=float, default=400, metavar="SECONDS", help="it ends within (default: 400)")
    add("--out", type=Path, metavar="DIR", help="for results (default: benchmarks/results; in a dry run none)")
    add("--shapes", nargs="+", default=names, choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    numbers = ", ".join(map(str, TOKENS))
    add("--tokens", nargs="+", type=int, default=list(TOKENS), choices=TOKENS, metavar="T", help=f"of: {numbers}")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: one a core)")
    add("--dry-run", action="store_true", help="tiny sizes on the CPU: does it run? Its times mean nothing")
    found = parser.parse_args()
    if found.budget < 30:
        parser.error(f"--budget: got {found.budget:g}; importing torch and compiling take 30 seconds at least")
    if found.jobs < 1:
        parser.error(f"--jobs: got {found.jobs}; give 1 or more")
    return found


def plan(shapes: list[str], tokens: list[int], budget: float) -> list[Task]:
    """What is measured, in order of value."""
    few, many = min(tokens), max(tokens)
    balanced, zipf = ROUTINGS
    first = shapes[0]

    def layers(number: int, routing: str, of: list[str] = shapes) -> Iterator[Task]:
        return (Task("layer", shape, number, routing) for shape in of)

    found = [
        Task("ceilings"),
        *layers(many, balanced, [first]),
        *layers(few, balanced, [first]),
        *layers(many, balanced, shapes[1:]),
        Task("products", first, many, balanced),
        *layers(few, balanced, shapes[1:]),
        *layers(many, zipf),
        Task("sweep", first, many, balanced, budget / 6),
        Task("warps", first, many, balanced),
        Task("others", first, many, balanced),
        Task("checks", first, few, balanced),
        Task("products", first, few, balanced),
        *(task for number in tokens for task in layers(number, balanced)),
        Task("one pass"),
        *(task for number in tokens for task in layers(number, zipf)),
    ]
    return list(dict.fromkeys(found))


def pieces(shapes: list[str], tokens: list[int]) -> Iterator[warm.Piece]:
    """What those tasks launch."""
    capability = "9.0" if DRY_RUN else ".".join(map(str, torch.cuda.get_device_capability()))
    if DRY_RUN:
        yield warm.Piece(capability, Sizes(T=64, K=2, E=4, D=64, F=128), "forward")
        return
    for number in sorted(tokens, reverse=True):
        for shape in (s for s in SHAPES if s.name in shapes):
            for part in warm.PARTS:
                yield warm.Piece(capability, Sizes(number, shape.K, shape.E, shape.D, shape.F), part)
    for number in TOKENS_OF_ONE_PASS:
        for part in warm.PARTS:
            yield warm.Piece(capability, Sizes(number, ONE_PASS.K, ONE_PASS.E, ONE_PASS.D, ONE_PASS.F), part)


class Record:
    """The rows, kept in a file that is always whole."""

    def __init__(self, folder: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rest: dict[str, Any] = {}
        name = "dry_run" if DRY_RUN else "_".join(torch.cuda.get_device_name().lower().split())
        self.file = folder / f"gpu_{name}.json" if folder else None

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print({name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()}, flush=True)
        self.write()

    def write(self) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        record = {"what": "MoE layers on a GPU", "dry run, times mean nothing": DRY_RUN, **self.rest, "rows": self.rows}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(self.file)


def measure(tasks: list[Task], record: Record, deadline: float) -> list[Task]:
    """Run the tasks in a process that measures, in another where that ends; gives back those without time."""
    todo = dict(enumerate(tasks))
    while todo and deadline - time.monotonic() > _ROW:
        ceilings = next((row for row in record.rows if row["what"] == "ceilings"), {})
        process = _start({"tasks": list(todo.items()), "ceilings": ceilings})
        said: queue.Queue[str | None] = queue.Queue()
        listener = threading.Thread(target=_listen, args=(process, said), daemon=True)
        listener.start()
        now: int | None = None
        why = ""
        while todo:
            limit = deadline - time.monotonic()
            if now is not None:
                limit = min(limit, max(_HANGS, todo[now].seconds + _ROW))
            try:
                line = said.get(timeout=max(limit, 0))
            except queue.Empty:
                why = "no time was left" if deadline - time.monotonic() <= 0 else f"no answer in {_HANGS} s"
                break
            if line is None:
                why = f"the process ended with code {process.wait()}"
                break
            if line.startswith(worker.BEGIN):
                now = int(line.removeprefix(worker.BEGIN))
                if deadline - time.monotonic() < _ROW:
                    break
            elif line.startswith(worker.ROW):
                record.add(json.loads(line.removeprefix(worker.ROW)))
            elif line.startswith(worker.END):
                del todo[int(line.removeprefix(worker.END))]
                now = None
            else:
                print(line, end="", flush=True)
        process.kill()
        process.wait()
        listener.join(_ENDING)
        if why and now is None and todo and deadline - time.monotonic() > 0:
            now = next(iter(todo))  # it fell before it began
        if why and now is not None:
            task = todo.pop(now)
            row = record.rows[-1] if record.rows and _is_of(record.rows[-1], task) else None
            if row is None or "failed" not in row:
                record.add({**dict(zip(Task._fields[:4], task, strict=False)), "failed": why})
    return list(todo.values())


def _is_of(row: dict[str, Any], task: Task) -> bool:
    return (row["what"], row.get("shape", ""), row.get("T", 0), row.get("routing", "")) == task[:4]


def _start(arguments: dict[str, Any]) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(arguments)]
    program += ["--dry-run"] if DRY_RUN else []
    return subprocess.Popen(program, cwd=common.ROOT, stdout=subprocess.PIPE, text=True)


def _listen(process: subprocess.Popen[str], said: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said.put(line)
    said.put(None)


def check_memory(seconds: float) -> dict[str, Any]:
    """A quick pass of each kernel under memcheck, in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    if DRY_RUN or tool is None:
        return {"what": "memcheck", "left out": "no compute-sanitizer in PATH, or a dry run"}
    if seconds < _ROW:
        return {"what": "memcheck", "left out": "no time was left"}
    program = [tool, "--tool", "memcheck", "--error-exitcode", "1"]
    program += [sys.executable, "-m", "benchmarks.gpu.one_pass", "--quick"]
    try:
        # Without torch's cache of memory a tensor ends where its memory does.
        done = subprocess.run(
            program, cwd=common.ROOT, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"what": "memcheck", "left out": f"it did not end in {seconds:.0f} s"}
    return {"what": "memcheck", **({"failed": done.stdout[-2000:]} if done.returncode else {"checked": "no errors"})}


def main() -> None:
    chosen = options()
    common.require_gpu()
    deadline = START + chosen.budget - _ENDING
    record = Record(chosen.out or (None if DRY_RUN else common.ROOT / "benchmarks" / "results"))
    record.add({"what": "warm"} | warm.compile_all(
        pieces(chosen.shapes, chosen.tokens), chosen.jobs, _WARMING * chosen.budget
    ))  # fmt: skip
    without_time = measure(plan(chosen.shapes, chosen.tokens, chosen.budget), record, deadline)
    record.add(check_memory(deadline - time.monotonic()))
    aims = verdicts(record.rows)
    record.rest = {"aims": aims, "no time was left for": [" ".join(map(str, task[:4])) for task in without_time]}
    record.write()
    for what in dict.fromkeys(row["what"] for row in record.rows):
        common.show(what, [{n: v for n, v in row.items() if n != "what"} for row in record.rows if row["what"] == what])
    common.show("All aims; the times of a dry run mean nothing" if DRY_RUN else "All aims", aims)
    if without_time:
        print(f"no time was left for: {'; '.join(record.rest['no time was left for'])}")
    print(f"{time.monotonic() - START:.0f} s; " + (f"saved to {record.file}" if record.file else "nothing saved"))
    failed = [row for row in record.rows if "failed" in row and row["what"] not in _FORGIVEN]
    failed += [row for row in record.rows if any(isinstance(v, float) and math.isnan(v) for v in row.values())]
    if failed:
        raise SystemExit(f"{len(failed)} rows failed")


if __name__ == "__main__":
    main()
