"""An operator's implementations in a table, and the one choice among them."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

from moesaic.ops.fastest import Call, fastest
from moesaic.ops.invariant import batch_invariant_enabled, only_implementation
from moesaic.ops.processor import Processor, processor


class Row(NamedTuple):
    """An implementation.

    Attributes:
        module: its functions; the package ``impl`` of the operator says which.
        refuses: given the operands, the error that says why it cannot compute with them; None if it can.
    """

    module: ModuleType
    refuses: Callable[..., Exception | None]


def takes_all(*operands: object) -> None:
    """Of an implementation that refuses nothing."""


def check_name(impl: str | None, table: Mapping[str, Row]) -> None:
    """Raise ``ValueError`` unless ``impl`` is None or the name of an implementation."""
    if impl is not None and impl not in table:
        raise ValueError(f"impl: unknown implementation {impl!r}; choose one of {sorted(table)} or None")


def choose(table: Mapping[str, Row], impl: str | None, call: Call, machine: Processor | None = None) -> ModuleType:
    """The module of the implementation called ``impl``; for None, of the fastest that does not refuse.

    Args:
        table: an operator's implementations by name.
        impl: a name, or None.
        call: what is computed.
        machine: what the fastest is the fastest on; this one's processor if None.

    Raises:
        ValueError: there is none of this name.
        ValueError, TypeError, RuntimeError: it refuses the operands.
    """
    if batch_invariant_enabled():
        impl = only_implementation(impl, call.operands[0])
    if impl is None:
        names = fastest(call, machine or processor())
        return next(table[name].module for name in names if table[name].refuses(*call.operands) is None)
    check_name(impl, table)
    refusal = table[impl].refuses(*call.operands)
    if refusal is not None:
        raise refusal
    return table[impl].module
