"""Implementations by name, and by the codes that operators take."""

from collections.abc import Mapping

AUTO = 0


def code_of(impl: str | None, implementations: Mapping[str, int]) -> int:
    """The code of a named implementation; ``AUTO`` for None.

    Raises:
        ValueError: there is none of this name.
    """
    if impl is None:
        return AUTO
    if impl not in implementations:
        raise ValueError(f"impl: unknown implementation {impl!r}; choose one of {sorted(implementations)} or None")
    return implementations[impl]
