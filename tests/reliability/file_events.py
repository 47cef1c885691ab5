"""Kill a process at any of its file events: `die_at(n)` counts, and ends the process before the n-th."""

import builtins
import os
import signal

from moesaic.checkpoint import exchange as exchanges

_EVENTS = [
    *((os, name) for name in ("mkdir", "open", "rename", "replace", "fsync", "unlink", "rmdir", "ftruncate")),
    (builtins, "open"),
]


class FileEvents:
    """Within it, file events are counted; `at`: the event before which the process is killed.

    With `exchange=False` the system cannot exchange folders. `only`: names of events; the others do not count.
    """

    def __init__(self, at=None, *, exchange=True, only=None):
        self.count = 0
        self._at, self._exchange, self._only = at, exchange, only
        self._before = []

    def __enter__(self):
        for module, name in _EVENTS:
            self._replace(module, name, getattr(module, name))
        self._replace(exchanges, "exchange", exchanges.exchange if self._exchange else lambda one, other: False)
        return self

    def __exit__(self, *error):
        for module, name, original in self._before:
            setattr(module, name, original)

    def _replace(self, module, name, work):
        self._before.append((module, name, getattr(module, name)))

        def event(*args, **kwargs):
            if self._only is None or name in self._only:
                self.count += 1
                if self.count == self._at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)

        setattr(module, name, event)
