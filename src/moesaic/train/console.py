"""What the user sees: a progress bar on a terminal, lines elsewhere. Only the first rank prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


@runtime_checkable
class Screen(Protocol):
    """The screen of one rank."""

    def message(self, text: str) -> None:
        """Print a text."""

    def start(self, step: int, steps: int) -> None:
        """Training begins at `step` of `steps`."""

    def update(self, step: int, values: Mapping[str, Any] | None) -> None:
        """`step` steps are done; `values` are the metrics of the last one, if they were taken."""

    def stop(self) -> None:
        """Training ends."""


def open_screen(leader: bool) -> Screen:
    """The screen of this rank. Only the first rank prints."""
    if not leader:
        return _Silent()
    # Under torchrun stdout is the terminal itself, or a file or pipe with --redirects and --tee.
    console = RichConsole(highlight=False)
    return _Terminal(console) if console.is_terminal else _Lines()


def describe(values: Mapping[str, Any]) -> str:
    """Metrics as one line."""
    form = {
        "loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "grad_norm": "grad {:.2f}",
        "lr": "lr {:.1e}",
        "balance": "balance {:.2f}",
        "dead_experts": "dead {:.0f}",
        "memory_gib": "mem {:.2f} GiB",
        "bits_per_byte": "held-out {:.3f} bits/byte",
        "held_out_loss": "held-out loss {:.4f}",
    }
    said = [text.format(values[name]) for name, text in form.items() if name in values]
    # Of further sets: bits_per_byte/set.
    for name in values:
        kind, _, label = name.partition("/")
        if label:
            said.append(form[kind].format(values[name]).replace("held-out", label))
    return "  ".join(said)


class _Silent:
    def message(self, text: str) -> None:
        pass

    def start(self, step: int, steps: int) -> None:
        pass

    def update(self, step: int, values: Mapping[str, Any] | None) -> None:
        pass

    def stop(self) -> None:
        pass


class _Lines:
    def __init__(self) -> None:
        self._steps = 0

    def message(self, text: str) -> None:
        print(text, flush=True)

    def start(self, step: int, steps: int) -> None:
        self._steps = steps

    def update(self, step: int, values: Mapping[str, Any] | None) -> None:
        if values is not None:
            width = len(str(self._steps))
            print(f"step {step:>{width}}/{self._steps}  {describe(values)}", flush=True)

    def stop(self) -> None:
        sys.stdout.flush()


class _Terminal:
    def __init__(self, console: RichConsole):
        self._console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._live: Live | None = None

    def message(self, text: str) -> None:
        # Not wrapped: paths and commands in it are there to be copied.
        self._console.print(Text(text), soft_wrap=True)

    def start(self, step: int, steps: int) -> None:
        self._task = self._progress.add_task("training", total=steps, completed=step)
        self._live = Live(Group(self._progress, Text("")), console=self._console, refresh_per_second=4)
        self._live.start()

    def update(self, step: int, values: Mapping[str, Any] | None) -> None:
        self._progress.update(self._task, completed=step)
        if values is not None and self._live is not None:
            self._live.update(Group(self._progress, Text(describe(values))))

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
