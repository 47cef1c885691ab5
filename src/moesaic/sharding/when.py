"""``when=``: for which values of its flags a line of a sharding rule stands.

A flag is an argument that is not a tensor, such as the ``dim`` of a softmax. An optional tensor counts as one too, by
whether it is given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.sharding.notation import Condition, Notation

When = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]
_KINDS: tuple[tuple[type, tuple[type, ...], str], ...] = (
    (torch.BoolType, (bool,), "a bool"),
    (torch.IntType, (int,), "an int"),
    (torch.FloatType, (int, float), "a number"),
    (torch.StringType, (str,), "a string"),
)


def conditions(op: torch._ops.OpOverload, when: When, num_lines: int) -> list[tuple[Condition, ...]]:
    """What ``when=`` says of each line.

    Raises:
        ValueError: it names no flag of the operator, gives a value that the flag cannot have, or is not for each line.
    """
    of_lines = [when] * num_lines if isinstance(when, Mapping) else list(when)
    if len(of_lines) != num_lines:
        raise ValueError(f"when: {len(of_lines)} entries for {num_lines} lines; give one mapping, or one for each line")
    return [tuple(_condition(op, name, value) for name, value in (of_line or {}).items()) for of_line in of_lines]


def flags_of(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives for each argument, or its default; of a tensor only that it is one."""
    values = {}
    for i, argument in enumerate(op._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        values[argument.name] = Tensor if isinstance(value, Tensor) else hashable(value)
    return values


def stands(line: Notation, flags: Mapping[str, Any]) -> bool:
    """Whether a line stands for a call with these flags."""
    return all(flags[name] in values for name, values in line.when)


def as_text(name: str, *values: Any) -> str:
    """``dim=1 or -1``; of an optional tensor ``mask given`` or ``without mask``."""
    if values == (None, Tensor) or values == (Tensor, None):
        return f"{name} given or not"
    if values == (Tensor,):
        return f"{name} given"
    return f"{name}={' or '.join('given' if v is Tensor else repr(_listed(v)) for v in values)}"


def said(line: Notation) -> str:
    """What a line says of flags, as text; "" if nothing."""
    return ", ".join(as_text(name, *values) for name, values in line.when)


def keyword(name: str, value: Any) -> str:
    """How to say in code that a line stands for a value."""
    return f"when={{{name!r}: {'Tensor' if value is Tensor else repr(_listed(value))}}}"


def _condition(op: torch._ops.OpOverload, name: str, value: Any) -> Condition:
    arguments = {a.name: a for a in op._schema.arguments}
    if name not in arguments:
        raise ValueError(f"when: {op._name} has no argument '{name}'; it has {', '.join(arguments)}")
    kind, optional = arguments[name].type, False
    if isinstance(kind, torch.OptionalType):
        kind, optional = kind.getElementType(), True
    if isinstance(kind, torch.TensorType) and not optional:
        raise ValueError(f"when: '{name}' is a tensor that every call gives; name flags and optional tensors")
    is_list = isinstance(kind, torch.ListType)
    several = isinstance(value, (set, frozenset)) or (
        isinstance(value, (list, tuple))
        and (not is_list or any(v is None or isinstance(v, (list, tuple)) for v in value))
    )
    values = tuple(dict.fromkeys(map(hashable, value if several else [value])))
    if not values:
        raise ValueError(f"when: no value of '{name}'; give those that the line stands for")
    for v in values:
        if problem := _misfit(kind, v, optional=optional):
            raise ValueError(f"when: '{name}' is {_listed(v)!r}, which no call can give: {problem}")
    return name, values


def _misfit(kind: Any, value: Any, *, optional: bool) -> str:
    if value is None:
        return "" if optional else "it is not optional"
    if isinstance(kind, torch.TensorType):
        return "" if value is Tensor else "it is a tensor. Say None for calls without it, torch.Tensor for others"
    if isinstance(kind, torch.IntType) and isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return ""  # a schema has them as ints
    for of_schema, types, name in _KINDS:
        wrong = not isinstance(value, types) or (isinstance(value, bool) and of_schema is not torch.BoolType)
        if isinstance(kind, of_schema) and wrong:
            return f"it is {name}"
    return ""


def hashable(value: Any) -> Any:
    """A list as a tuple; anything else as it is."""
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


def _listed(value: Any) -> Any:
    return [*map(_listed, value)] if isinstance(value, tuple) else value
