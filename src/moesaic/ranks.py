"""Ranks that act together: they share values, and when one fails, all fail.

Everything here works without a process group too: then there is one rank. Calls that exchange something are collective:
every rank makes them, in the same order.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


PATIENT = "moesaic: waits for long"
"""The description of process groups whose collectives may take long."""

# The process group that calls without a group use. Each thread has its own.
_talking_in: ContextVar[dist.ProcessGroup | None] = ContextVar("talking_in", default=None)


class _NotThere:
    def __repr__(self) -> str:
        return "not there"


_NOT_THERE = _NotThere()


def active() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if active() else 0


def is_leader() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def leads_launch() -> bool:
    """Whether this is the first process of a launcher such as torchrun, also before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if active() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()


@contextmanager
def talking_in(group: dist.ProcessGroup | None) -> Iterator[None]:
    """In this thread, calls without a group use this one, of all ranks. None is the default group."""
    before = _talking_in.set(group)
    try:
        yield
    finally:
        _talking_in.reset(before)


def group_here() -> dist.ProcessGroup | None:
    """The group of :func:`talking_in`."""
    return _talking_in.get()


def is_current(group: dist.ProcessGroup) -> bool:
    """Whether a group still is, and has not gone with the default group."""
    try:
        return dist.get_world_size(group) == world_size()
    except (ValueError, KeyError, RuntimeError):
        return False


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, in rank order, on every rank; of those of ``group``, if given. Values are pickled."""
    if not active():
        return [value]
    group = group or group_here()
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_leader(value: T) -> T:
    """The value of rank 0, on every rank."""
    return gather(value)[0]


def agree(value: Any, what: str) -> None:
    """Raise ``ValueError`` on all ranks unless ``value`` is the same on all of them; ``what`` names it in the text.

    Of mappings the text names the keys that differ, with both values.
    """
    values = gather(value)
    other = next((index for index, theirs in enumerate(values) if theirs != values[0]), None)
    if other is not None:
        raise ValueError(
            f"ranks 0 and {other} have different {what}{_differences(values, other)}; give all ranks the same"
        )


def _differences(values: list[Any], other: int) -> str:
    mine, theirs = values[0], values[other]
    if not isinstance(mine, dict) or not isinstance(theirs, dict):
        return ""
    keys = [key for key in {**mine, **theirs} if mine.get(key, _NOT_THERE) != theirs.get(key, _NOT_THERE)]
    said = [f"{key} is {mine.get(key, _NOT_THERE)!r} and {theirs.get(key, _NOT_THERE)!r}" for key in keys]
    return f": {', '.join(said)}"


def together(work: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Run ``work()`` on every rank, or every rank of ``group``, and give back the results in rank order.

    If it raises an exception on any rank, all ranks raise. A rank that failed raises its own. The others raise a copy
    of that of the lowest rank that failed, with a note that names the rank.
    """
    result: Any = None
    own: Exception | None = None
    try:
        result = work()
    except Exception as error:
        own = error
    outcomes = gather((result, _portable(own)), group)
    if own is not None:
        raise own
    for index, (_, error) in enumerate(outcomes):
        if error is not None:
            where = index if group is None else dist.get_global_rank(group, index)
            error.add_note(f"This happened on rank {where}; the other ranks stop too.")
            raise error
    return [value for value, _ in outcomes]


def on_leader(work: Callable[[], T]) -> T:
    """Run ``work()`` on rank 0, and give its result to every rank. Failures are shared as in :func:`together`."""
    result: Any = together(work if is_leader() else lambda: None)[0]
    return result


def share_failure(error: Exception | None) -> None:
    """Raise on all ranks if any of them brings an error, as :func:`together` does."""

    def bring() -> None:
        if error is not None:
            raise error

    together(bring)


def _portable(error: Exception | None) -> Exception | None:
    """The error; or a RuntimeError that says the same, if the error cannot be pickled and read again."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
