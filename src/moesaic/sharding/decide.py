"""The registry of rules, and what a rule decides about a call. It looks at global metadata alone, without DTensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.sharding.admission import Call, Decision, ShardingError, admit, explain
from moesaic.sharding.notation import Notation, with_spaces
from moesaic.sharding.rule import Placements, Rule
from moesaic.sharding.sizes import fit
from moesaic.sharding.when import as_text, flags_of, keyword, stands

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


def as_called(op: torch._ops.OpOverload, args: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and those by keyword, of all in the order of the schema."""
    arguments = op._schema.arguments[: len(args)]
    first = next((i for i, a in enumerate(arguments) if a.kwarg_only), len(args))
    return tuple(args[:first]), {a.name: v for a, v in zip(arguments[first:], args[first:], strict=True)}


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
    fitting = fitting_line(op, args, kwargs or {})
    call = _call(op, fitting, placements, axes)
    decision = admit(RULES[op], fitting.line, call)
    if decision is None:
        raise ShardingError(explain(RULES[op], fitting.line, call))
    return replace(decision, results=fitting.results)


def admits(
    op: torch._ops.OpOverload, fitting: "Fitting", placements: Sequence[Placements], axes: Mapping[str, int]
) -> Decision | None:
    """As :func:`decide`, but None where that raises: making the text of the error takes longest."""
    return admit(RULES[op], fitting.line, _call(op, fitting, placements, axes))


@dataclass(frozen=True)
class Fitting:
    """What of a call does not depend on placements.

    Attributes:
        line: of the rule, which speaks for the call.
        sizes: of its factors.
        results: on global shapes, without values.
        numels, present: of the tensors that are given; for each tensor argument, whether it is.
    """

    line: Notation
    sizes: dict[str, int]
    results: tuple[Tensor, ...]
    numels: tuple[int, ...]
    present: tuple[bool, ...]


def fitting_line(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Fitting:
    """The line of the rule that speaks for a call.

    Raises:
        ShardingError: there is none.
    """
    tensors = tensor_arguments(op, args, kwargs)
    results = _results(op, args, kwargs)
    shapes = [None if t is None else tuple(t.shape) for t in tensors]
    line, sizes = _line_for(op, shapes, [tuple(r.shape) for r in results], flags_of(op, args, kwargs))
    numels = tuple(t.numel() for t in tensors if t is not None)
    return Fitting(line, sizes, results, numels, tuple(t is not None for t in tensors))


def _call(
    op: torch._ops.OpOverload, fitting: Fitting, placements: Sequence[Placements], axes: Mapping[str, int]
) -> Call:
    """The call as admission sees it."""
    return Call(
        op=op._name,
        axis_names=tuple(axes),
        axis_sizes=tuple(axes.values()),
        placements=tuple(map(tuple, placements)),
        numels=fitting.numels,
        present=fitting.present,
        sizes=fitting.sizes,
    )


def _line_for(
    op: torch._ops.OpOverload,
    shapes: Sequence[tuple[int, ...] | None],
    results: Sequence[tuple[int, ...]],
    flags: Mapping[str, Any],
) -> tuple[Notation, dict[str, int]]:
    """The first line that fits the shapes and stands for the flags, and the sizes of its factors."""
    rule, of_other_flags = RULES[op], []
    # An argument that was not given has no shape to disagree.
    present = [shape is not None for shape in shapes]
    known = [shape for shape in shapes if shape is not None]
    for line in rule.lines:
        fitting = fit(line.given(present), known, results)
        if fitting is not None:
            if stands(line, flags):
                given, sizes = fitting
                return line.expand(given.num_any), sizes
            of_other_flags.append(line)
    given = ", ".join(f"{n} {list(s)}" for n, s in zip(rule.tensors, shapes, strict=True) if s is not None)
    made = ", ".join(str(list(shape)) for shape in results)
    tried = "\n".join(f"  {line}" for line in str(rule).splitlines())
    if of_other_flags:
        names = dict.fromkeys(n for line in of_other_flags for n, values in line.when if flags[n] not in values)
        has = ", ".join(as_text(n, flags[n]) for n in names)
        hint = " or ".join(keyword(n, flags[n]) for n in names)
        raise ShardingError(
            f"{op._name}: its sharding rule does not stand for {has}. It has\n{tried}\n"
            f"Call it as a line says, or add a line that holds for this call: sharding_rule(..., {hint})"
        )
    hint = hint_of_spaces(rule, known)
    raise ShardingError(f"{op._name}: no line of its rule fits the shapes {given} -> {made}:\n{tried}{hint}")


def hint_of_spaces(rule: Rule, shapes: Sequence[Sequence[int]]) -> str:
    """What to write, where a rule has words for dims that tensors have as letters; "" if it has not."""
    for line in rule.lines:
        words = ["".join(map(str, p.dims)) for p in line.inputs]
        apart = with_spaces(line.text)
        if apart and [len(word) for word in words] == [len(shape) for shape in shapes]:
            return f"\nA word is one factor; to name a dim by each letter write '{apart}'"
    return ""


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
