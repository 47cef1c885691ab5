"""The registry of rules, and what a rule decides about a call. It looks at global metadata alone, without DTensor."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesaic.sharding.admission import Call, Decision, ShardingError, admit, explain
from moesaic.sharding.notation import Notation
from moesaic.sharding.rule import Placements, Rule
from moesaic.sharding.sizes import factor_sizes

RULES: dict[torch._ops.OpOverload, Rule] = {}


def overload_of(op: Any) -> torch._ops.OpOverload:
    """The overload that a ``custom_op``, an ``OpOverload`` or an ``OpOverloadPacket`` stands for.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(op, torch._ops.OpOverload):
        return op
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op.default
    if isinstance(op, torch.library.CustomOpDef):
        return op._opoverload
    raise TypeError(
        f"expected an operator: a custom_op, a triton_op, an OpOverload or an OpOverloadPacket, not {type(op).__name__}"
    )


def rule_of(op: Any) -> Rule:
    """The rule an operator was given.

    Raises:
        KeyError: it has none.
    """
    overload = overload_of(op)
    if overload not in RULES:
        raise KeyError(f"{overload} has no sharding rule; give it one: sharding_rule(...)({overload})")
    return RULES[overload]


def is_tensor(kind: Any) -> bool:
    """Whether an argument of this schema type is a tensor or an optional tensor."""
    if isinstance(kind, torch.OptionalType):
        kind = kind.getElementType()
    return isinstance(kind, torch.TensorType)


def tensor_arguments(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call gives for each tensor argument, in schema order; None for an optional one that is not given."""
    values = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if is_tensor(argument.type)
    ]
    # torch takes Python numbers for tensors, as in `x + 1`.
    return [v if v is None or isinstance(v, Tensor) else torch.tensor(v) for v in values]


def decide(
    op: torch._ops.OpOverload,
    args: Sequence[Any],
    placements: Sequence[Placements],
    axes: Mapping[str, int],
    kwargs: Mapping[str, Any] | None = None,
) -> Decision:
    """Where the tensors of a call lie, by the operator's rule.

    Args:
        args, kwargs: of the call; of tensors only shape, stride and dtype are looked at, and they are the global ones.
        placements: for each tensor that is given, a placement for each mesh axis.
        axes: sizes of the mesh axes by name.

    Raises:
        ShardingError: the rule does not admit the call. It names the nearest placements that it does.
    """
    results, line, call = _call(op, args, placements, axes, kwargs or {})
    decision = admit(RULES[op], line, call)
    if decision is None:
        raise ShardingError(explain(RULES[op], line, call))
    return replace(decision, results=results)


def admits(
    op: torch._ops.OpOverload, args: Sequence[Any], placements: Sequence[Placements], axes: Mapping[str, int]
) -> Decision | None:
    """As :func:`decide`, but None where that raises: making the text of the error takes longest."""
    try:
        _, line, call = _call(op, args, placements, axes, {})
    except ShardingError:
        return None
    return admit(RULES[op], line, call)


def _call(
    op: torch._ops.OpOverload,
    args: Sequence[Any],
    placements: Sequence[Placements],
    axes: Mapping[str, int],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Tensor, ...], Notation, Call]:
    """The results on global shapes, the line that speaks for a call, and the call as admission sees it."""
    tensors = tensor_arguments(op, args, kwargs)
    results = _results(op, args, kwargs)
    shapes = [None if t is None else tuple(t.shape) for t in tensors]
    line, sizes = _line_for(op, RULES[op], shapes, [tuple(r.shape) for r in results])
    call = Call(
        op=op._name,
        axis_names=tuple(axes),
        axis_sizes=tuple(axes.values()),
        placements=tuple(map(tuple, placements)),
        numels=tuple(t.numel() for t in tensors if t is not None),
        present=tuple(t is not None for t in tensors),
        sizes=sizes,
    )
    return results, line, call


def _line_for(
    op: torch._ops.OpOverload,
    rule: Rule,
    shapes: Sequence[tuple[int, ...] | None],
    results: Sequence[tuple[int, ...]],
) -> tuple[Notation, dict[str, int]]:
    """The first line that fits the shapes, and the sizes of its factors."""
    # An argument that was not given has no shape to disagree.
    present = [shape is not None for shape in shapes]
    known = [shape for shape in shapes if shape is not None]
    for line in rule.lines:
        sizes = factor_sizes(line.given(present), known, results)
        if sizes is not None:
            return line, sizes
    given = ", ".join(f"{n} {list(s)}" for n, s in zip(rule.tensors, shapes, strict=True) if s is not None)
    made = ", ".join(str(list(shape)) for shape in results)
    tried = "\n".join(f"  {line}" for line in rule.lines)
    raise ShardingError(f"{op._name}: no line of its rule fits the shapes {given} -> {made}:\n{tried}")


def on_meta(value: Any) -> Any:
    """A tensor without its values; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _results(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The results on global shapes, from the operator's own fake kernel."""

    try:
        results = op(*map(on_meta, args), **{name: on_meta(value) for name, value in kwargs.items()})
    except Exception as error:
        if "fake impl" not in str(error) and "'Meta' backend" not in str(error):
            raise
        hint = "register one, which makes results of the right shapes without values: op.register_fake(function)"
        raise ShardingError(f"{op._name} has no fake kernel; {hint}") from error
    return (results,) if isinstance(results, Tensor) else tuple(results)
