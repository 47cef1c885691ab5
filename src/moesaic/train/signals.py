"""Ctrl-C, SIGTERM and SIGHUP set a flag that the training loop reads; they do not interrupt a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """Within the context, the first signal sets `wanted` and calls `notify`. Later signals change nothing.

    A launcher and the terminal may both send a signal, and the second must not cut off the checkpoint that the first
    asked for.
    """

    def __init__(self, notify: Callable[[str], None]):
        self.wanted = False
        self._notify = notify
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python only lets the main thread have signal handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _heard()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.wanted:
            self.wanted = True
            self._notify(signal.Signals(number).name)


def _heard() -> list[signal.Signals]:
    signals = [signal.SIGINT, signal.SIGTERM]
    # A closed terminal sends SIGHUP. Under nohup it is to be ignored, and Windows has none.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals
