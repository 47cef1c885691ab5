"""Results of a benchmark, printed and written as they come: a run that is stopped leaves what it has.

    with Results(file, {"what": ...}, as_text) as results:
        for case in cases:
            results.add(measure(case))
    results.done()

Ctrl-C and SIGTERM end the block, and the program goes on to show what there is. `done` ends it then.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

QUICK = "a part of it, in less than two minutes: does it run, and roughly how fast?"


class Results:
    """Rows of a results file.

    Args:
        file: rewritten after each row; None for none.
        about: what else is in the file. It may be changed until the end.
        as_text: a row in one line, which is printed.
        merge: what becomes of the rows in the file; by default they are all there is.
        key: the name of the rows in the file.

    Attributes:
        rows: all that was added.
        stopped: whether somebody stopped it before its end. The file says so then.
    """

    def __init__(
        self,
        file: Path | None,
        about: dict[str, Any],
        as_text: Callable[[Row], str],
        merge: Callable[[list[Row]], list[Row]] = list,
        key: str = "rows",
    ) -> None:
        self.file, self.about, self.as_text, self.merge, self.key = file, about, as_text, merge, key
        self.rows: list[Row] = []
        self.stopped = False

    def __enter__(self) -> "Results":
        self._before = signal.signal(signal.SIGTERM, _stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        signal.signal(signal.SIGTERM, self._before)
        self.stopped = kind is KeyboardInterrupt
        if self.stopped:
            print("stopped; this is what was measured:", file=sys.stderr, flush=True)
        self.write()
        return self.stopped

    def add(self, rows: Row | Iterable[Row]) -> None:
        """Print one or more rows, and write them with all others."""
        for row in [rows] if isinstance(rows, dict) else rows:
            self.rows.append(row)
            print(self.as_text(row), flush=True)
        self.write()

    def write(self) -> None:
        """Write the file anew. Whoever stops the program finds the old one or the new one."""
        if self.file is None:
            return
        record = self.about | {self.key: self.merge(self.rows)} | ({"stopped": True} if self.stopped else {})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(self.file.name + ".new")
        new.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(new, self.file)

    def done(self) -> None:
        """Say where the file is; end the program if it was stopped."""
        if self.file is not None:
            print(f"written: {self.file}", flush=True)
        if self.stopped:
            sys.exit(130)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table of text."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
