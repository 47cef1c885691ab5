"""``moesaic report``: options, the file that is written, exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moesaic.options import parse
from moesaic.train.errors import UserError, check_packages


@dataclass(frozen=True)
class Options:
    """Write a page about a run of moesaic train, or one that compares several runs, to open in a browser.

    The page is one file and needs no network. It has curves of loss, throughput and memory, the load of every expert
    over steps and layers, dead experts, settings and how they differ between runs, scores and samples. It can also be
    written while a run is still going on.

    Exit status: 0 written; 2 it cannot be written.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders of moesaic train."""
    out: Path | None = None
    """The file to write. By default report.html: for one run in its folder, for several in the current folder."""


def run(arguments: Sequence[str]) -> int:
    """Run ``moesaic report`` and return its exit status."""
    options = parse(Options, "report", arguments)
    try:
        out, size = _write(options)
    except UserError as error:
        print(f"moesaic report: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {size / 2**20:.1f} MiB; open it in a browser")
    return 0


def _write(options: Options) -> tuple[Path, int]:
    from moesaic.checkpoint.run_folder import REPORT
    from moesaic.report.page import render
    from moesaic.report.record import read_runs

    if not options.runs:
        raise UserError("give at least one run folder")
    check_packages("it", "report", "plotly", "jinja2")
    records = read_runs(options.runs)
    out = options.out or (options.runs[0] / REPORT if len(records) == 1 else Path(REPORT))
    fresh = out.with_name(f".{out.name}.tmp")
    page = render(records).encode()
    try:
        fresh.write_bytes(page)
        os.replace(fresh, out)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another file with --out") from error
    return out, len(page)
