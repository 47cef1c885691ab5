"""``moesaic tune``: options, what is printed, exit status."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.ops import fastest, native, tuned
from moesaic.ops.choices import LARGEST, SHAPES, Choices, dtype_name
from moesaic.ops.native import DTYPES
from moesaic.ops.processor import processor
from moesaic.options import parse
from moesaic.tune.measure import SIZES, Timed, chosen, measure

_LABELS = {"cpu": "kernels", "torch": "torch"}
_COLUMNS = {shape: f"up to {most}" for shape, most in LARGEST.items()} | {"one": "1 row", "many": "more"}


@dataclass(frozen=True)
class Options:
    """Measure whether moesaic's kernels or torch's products compute experts faster on this machine's CPU.

    Takes ten to thirty seconds on an idle machine. The choices are kept in a file. Programs that start later use them
    if they call moesaic without impl=, with the same processor, kernels, torch and class of thread counts. A training
    run that is resumed keeps the choices that it began with.

    The file is named by MOESAIC_TUNED, by default tuned.json in $XDG_CACHE_HOME/moesaic (~/.cache/moesaic). With
    MOESAIC_TUNED=none no file is used. `moesaic info` shows what is chosen.

    Exit status: 0 done; 2 it cannot be done.
    """

    dry_run: bool = False
    """Measure and print, but keep nothing."""
    show: bool = False
    """Do not measure; print what is kept for this machine."""
    forget: bool = False
    """Do not measure; delete what is kept for this machine."""
    threads: int | None = None
    """Threads of torch. By default as many as torch uses by itself. The choices hold for 1, 2-8, 9-32, or more threads.
    """
    rounds: int = 5
    """Timed runs of each implementation, for each kind of call."""


class _CannotError(Exception):
    """What the user is told."""


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic tune`` and return its exit status."""
    options = parse(Options, "tune", arguments)
    threads = torch.get_num_threads()
    try:
        _check(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        _tune(options)
    except (_CannotError, ValueError) as error:
        print(f"moesaic tune: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _check(options: Options) -> None:
    if options.dry_run + options.show + options.forget > 1:
        raise _CannotError("give one of --dry-run, --show and --forget")
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise _CannotError(f"--{name} must be at least 1, not {value}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise _CannotError("processes that measure at the same time disturb each other: run it without a launcher")
    loaded = native.kernels()
    if isinstance(loaded, str):
        raise _CannotError(f"there are no CPU kernels here to choose, {loaded}")


def _tune(options: Options) -> None:
    threads = torch.get_num_threads()
    kind, path = tuned.kind_of(processor(), threads), tuned.file()
    if path is None and not options.dry_run:
        where = "MOESAIC_TUNED is none" if os.environ.get("MOESAIC_TUNED") else "there is no home folder"
        raise _CannotError(f"{where}: name a file by MOESAIC_TUNED, or give --dry-run")
    if options.show or options.forget:
        assert path is not None
        print(_shown(path, kind) if options.show else _forgotten(path, kind))
        return
    print(f"{kind.processor}, {kind.kernels} kernels, torch {kind.torch}, {threads} thread{'s'[: threads != 1]}")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > max(1, (os.cpu_count() or 1) / 4):
        print(f"this machine is busy (load {busy:.1f}): the result may be wrong; better measure when it is idle")
    print("time of torch's products over that of the kernels, by rows an expert; above 1 the kernels are faster\n")
    start = time.monotonic()
    timed = _measured(options.rounds)
    choices = chosen(timed, fastest.by_entries(processor()))
    print(f"\n{_summary(choices)}\nmeasured in {time.monotonic() - start:.0f} s")
    if path is None or options.dry_run:
        print("nothing was kept (--dry-run)")
        return
    seconds = {
        f"{dtype_name(one.case.dtype)} {one.case.operator} {one.case.shape}": [
            dict(zip(sizes._fields, sizes, strict=True)) | one_size
            for sizes, one_size in zip(SIZES, one.seconds, strict=True)
        ]
        for one in timed
    }
    try:
        damaged = _damage(path)
        tuned.keep(path, kind, tuned.Tuned(choices, time.strftime("%Y-%m-%d"), seconds))
    except OSError as error:
        raise _CannotError(
            f"cannot write {path}: {error.strerror or error}; name another file by MOESAIC_TUNED"
        ) from error
    print(f"kept in {path}" + (f" ({damaged}; it was written anew)" if damaged else ""))


def _measured(rounds: int) -> list[Timed]:
    """All of them; a line is printed for each operator."""
    width = len("grouped_mm_accumulate_weight_grad")
    print(f"{'':{width + 9}}" + "".join(f"{_COLUMNS[shape]:>9}" for shape in SHAPES))
    found: list[Timed] = []
    for dtype in DTYPES:
        for one in measure(dtype, rounds):
            if one.case.shape == SHAPES[0]:
                print(f"{dtype_name(dtype):9}{one.case.operator:{width}}", end="", flush=True)
            print(f"{one.ratio:8.2f}x", end="\n" if one.case.shape == SHAPES[-1] else "", flush=True)
            found.append(one)
    return found


def _summary(choices: Choices) -> str:
    """How many kinds of call go to which implementation, by dtype."""
    lines = []
    for dtype in DTYPES:
        of_dtype = [name for case, name in choices.items() if case.dtype == dtype]
        counts = [f"{of_dtype.count(name)} to {label}" for name, label in _LABELS.items() if name in of_dtype]
        lines.append(f"{dtype_name(dtype)}: of {len(of_dtype)} kinds of call {' and '.join(counts)}")
    return "\n".join(lines)


def _damage(path: Path) -> str | None:
    try:
        tuned.read(path)
    except ValueError as error:
        return str(error)
    return None


def _shown(path: Path, kind: tuned.Kind) -> str:
    kept = tuned.read(path)
    what = f"{kind.processor}, {kind.kernels} kernels, torch {kind.torch}, threads {kind.threads}"
    if kind not in kept:
        others = f"; it has {len(kept)} of other kinds" if kept else ""
        return f"nothing is kept for this machine ({what}) in {path}{others}"
    found = kept[kind]
    rows = [
        f"{dtype_name(case.dtype):9}{case.operator:35}{_COLUMNS[case.shape]:9}{_LABELS[name]}"
        for case, name in found.choices.items()
    ]
    return "\n".join([f"{what}, measured on {found.measured}, in {path}", *rows, _summary(found.choices)])


def _forgotten(path: Path, kind: tuned.Kind) -> str:
    damaged = _damage(path)
    try:
        known = tuned.keep(path, kind, None)
    except OSError as error:
        raise _CannotError(f"cannot write {path}: {error.strerror or error}") from error
    if damaged:
        return f"{damaged}; all that it had is forgotten"
    return f"forgotten; {path} keeps nothing of this machine now" if known else f"nothing was kept in {path}"
