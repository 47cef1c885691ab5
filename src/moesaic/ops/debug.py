"""Opt-in checks that have to read tensor values, and so would stall a GPU on every call."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_ENABLED: ContextVar[bool] = ContextVar("moesaic_debug_checks", default=False)


def debug_checks_enabled() -> bool:
    """Whether the caller is inside :func:`debug_checks`."""
    return _ENABLED.get()


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
    """Check the values of group sizes and routing indices in every operator called inside.

    On CPU the values are checked always, since reading them costs nothing there. On CUDA a check copies
    them to the host and waits for it, which is why it has to be asked for. Bad values raise ``ValueError``
    with the argument, the value and what it must be. The setting belongs to the calling thread: autograd runs
    CUDA backward passes on threads of its own, which do not see it.

    Example:
        >>> with moesaic.debug_checks():
        ...     y = moesaic.grouped_mm(x, w, group_sizes)
    """
    token = _ENABLED.set(True)
    try:
        yield
    finally:
        _ENABLED.reset(token)
