"""Forward passes that are no training: they leave no trace in loads and losses."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_UNCOUNTED: ContextVar[bool] = ContextVar("moesaic_uncounted", default=False)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Let forward passes inside count no tokens, and hand no losses to :func:`moesaic.layers.balance_losses`.

    For passes in training mode that only ask for shapes, warm something up, or measure. What they compute, gradients
    too, is the same as outside.

    Example:
        >>> with moesaic.layers.uncounted():
        ...     shape = moe(x).shape
    """
    token = _UNCOUNTED.set(True)
    try:
        yield
    finally:
        _UNCOUNTED.reset(token)


def is_uncounted() -> bool:
    """Whether this code runs inside :func:`uncounted`."""
    return _UNCOUNTED.get()
