"""Ctrl-C, SIGTERM and SIGHUP set a flag that the training loop reads; they do not interrupt a step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# Seconds that a process has to tell of a lost rank.
_LINGER = 12.0


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


def linger_on_sigterm() -> None:
    """Let SIGTERM end this process only after a while.

    When a rank is lost, torchrun sends that to all others, and they would have no time to say which one it was.
    """

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    timer = threading.Timer(_LINGER, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def _heard() -> list[signal.Signals]:
    signals = [signal.SIGINT, signal.SIGTERM]
    # A closed terminal sends SIGHUP. Under nohup it is to be ignored, and Windows has none.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals
