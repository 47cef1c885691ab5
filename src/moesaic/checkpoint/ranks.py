"""Ranks that act together outside the model: they share values, and when one fails they all do.

Works with no process group as well: then there is one rank.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def active() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if active() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank. Values are pickled."""
    if not active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _portable(error: Exception | None) -> Exception | None:
    """The error, or where it cannot be pickled and read again one that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def together(work: Callable[[], T], *errors: type[Exception]) -> list[T]:
    """`work()` of every rank, in rank order; if it raises one of `errors` on any rank, all ranks raise.

    Where it failed itself a rank raises its own error; the others raise that of the lowest rank that failed. Any other
    exception is raised at once and leaves the other ranks waiting: it is a bug.
    """
    result: Any = None
    own: Exception | None = None
    try:
        result = work()
    except errors as error:
        own = error
    outcomes = gather((result, _portable(own)))
    if own is not None:
        raise own
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]
