"""Saving in the background: the state is copied to the host's memory, and a thread writes the copy.

The threads of all ranks talk in a process group of their own, so that training goes on beside them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moesaic import ranks
from moesaic.checkpoint.folder import CheckpointError
from moesaic.sharding.parts import copy_to_host

# A slow disk is no reason to give up.
_PATIENCE = timedelta(days=1)


class _Save:
    """One save in the background."""

    def __init__(self, write: Callable[[], Any], group: dist.ProcessGroup | None):
        self._write, self._group = write, group
        self._error: BaseException | None = None
        # Python waits for it at the end of the process.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=False)
        self._thread.start()

    def _run(self) -> None:
        try:
            with ranks.talking_in(self._group):
                self._write()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise CheckpointError(f"the save in the background failed: {self._error}") from self._error


_pending: _Save | None = None
_group: dist.ProcessGroup | None = None


def start(write: Callable[[], Any]) -> None:
    """Let a thread run ``write``, once the save before it is done. Collective; raises what that one raised."""
    global _pending
    wait()
    _pending = _Save(write, _own_group())


def wait() -> None:
    """Wait for the save in the background, if there is one.

    Raises:
        CheckpointError: it failed, on all ranks.
    """
    global _pending
    pending, _pending = _pending, None
    if pending is not None:
        pending.wait()


def copied(state: Any) -> Any:
    """A state whose tensors do not change any more: copies in the host's memory, laid out as before."""
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(copied, state))
    return copy_to_host(state) if isinstance(state, Tensor) else state


def _own_group() -> dist.ProcessGroup | None:
    """The group that the threads talk in; made at the first call, and again after the default group was."""
    global _group
    if not ranks.active():
        return None
    if _group is None or not ranks.is_current(_group):
        made: Any = dist.new_group(backend="gloo", timeout=_PATIENCE, group_desc=ranks.PATIENT)
        _group = made
    return _group
