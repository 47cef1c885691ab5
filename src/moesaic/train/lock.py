"""A lock on a run folder: one launch at a time writes into it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import weakref
from pathlib import Path

from moesaic.checkpoint.run_folder import LOCK
from moesaic.train.errors import UserError
from moesaic.train.folder import launch_id

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """Holds the folder for this process, until :meth:`release` or its end, however it ends.

    The system's lock on the file `lock` counts. What the file says is for people: host, process and time of its owner.
    So a file that a dead process left behind locks nothing.

    Raises:
        UserError: another process has the folder.
    """

    def __init__(self, folder: Path):
        path = folder / LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write into the run folder {folder}: {error.strerror}") from error
        # Kept open: to close it is to let go.
        self._close = weakref.finalize(self, os.close, descriptor)
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise UserError(
                    f"the run in {folder} is in use by {_owner(path)}; wait until it ends or stop it, or choose "
                    "another --out"
                ) from None
            except OSError:
                # A file system without locks.
                pass
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        own = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "launch": launch_id()}
        # What it says is a help only: a full disk is no reason not to go on.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(own).encode())

    def release(self) -> None:
        """Let go of the folder."""
        self._close()


def _owner(path: Path) -> str:
    try:
        said = json.loads(path.read_text())
        return f"process {said['process']} on {said['host']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
