"""What arguments are: errors that name the argument, what it got, and what to give instead."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.dtypes import FLOATS


def check_tensors(**arguments: Any) -> None:
    """Raise ``TypeError`` for an argument that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected a torch.Tensor, got {type(value).__name__}; torch.as_tensor({name}) makes one"
            )


def check_given(**arguments: Any) -> None:
    """Raise ``TypeError`` for an argument that is no tensor."""
    for name, value in arguments.items():
        if value is None:
            raise TypeError(f"{name}: expected a torch.Tensor, got None")
    check_tensors(**arguments)


def check_floats(**tensors: Tensor | None) -> None:
    """Raise ``TypeError`` for a tensor whose dtype operators do not take; fp8 and integers, for instance."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{name}: dtype {t.dtype} is not supported; use one of {FLOATS}")


def check_fit(operator: str, operands: Iterable[tuple[str, Any, Sequence[str]]]) -> dict[str, int]:
    """Raise ``ValueError`` unless operands fit each other: a size for each letter of their dims, and one device.

    For operators, which may be called without the public function that checks more: kernels take sizes from one
    operand and read the others by them.

    Args:
        operator: its name, for the message.
        operands: of each its name, the tensor or quantised weight, and a letter for each dim; None is not given.

    Returns:
        the size of each letter.
    """
    sizes: dict[str, int] = {}
    device = None
    for name, t, dims in operands:
        if t is None:
            continue
        if t.ndim != len(dims):
            raise ValueError(f"{operator}: {name}: expected [{', '.join(dims)}], got {list(t.shape)}")
        for dim, size in zip(dims, t.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                expected = [sizes.get(d, d) for d in dims]
                raise ValueError(
                    f"{operator}: {name}: expected [{', '.join(map(str, expected))}] to match the arguments before it "
                    f"([{', '.join(dims)}]), got {list(t.shape)}"
                )
        device = device or t.device
        if t.device != device:
            raise ValueError(
                f"{operator}: {name}: is on {t.device}, the arguments before it on {device}; move it there"
            )
    return sizes


def check_dtype_of(operator: str, dtype: torch.dtype, operands: Iterable[tuple[str, Any]]) -> None:
    """Raise ``TypeError`` for an operand of another dtype: a kernel would read its memory as this one."""
    for name, t in operands:
        if t is not None and t.dtype != dtype:
            raise TypeError(f"{operator}: {name}: expected {dtype}, got {t.dtype}; cast it")


def check_int(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value is an integer: of Python, of numpy, or symbolic."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return
    if isinstance(value, bool | Tensor) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name}: expected an int, got {_said(value)}{_as_int(value)}")


def check_number(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value is a real number of Python or numpy."""
    if isinstance(value, bool | str | Tensor) or not (
        hasattr(type(value), "__float__") or hasattr(type(value), "__index__")
    ):
        raise TypeError(f"{name}: expected a number, got {_said(value)}")


def check_bool(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_said(value)}")


def divisors(n: int) -> list[int]:
    """All numbers that divide ``n``, the smallest first: what may be chosen for a size that has to."""
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest(name: str, known: Any) -> str:
    """The end of an error about an unknown name: the known one that is nearest, or all of them."""
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"


def _said(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})" if isinstance(value, str | int | float) else type(value).__name__


def _as_int(value: Any) -> str:
    try:
        whole = int(value)
        return f"; give {whole}" if whole == float(value) and not isinstance(value, bool) else ""
    except (TypeError, ValueError, OverflowError):
        return ""
