"""Calls that a rule admits and no example is: other flags, tensors left out. What can be made up is tried too."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.sharding.decide import RULES, is_tensor
from moesaic.sharding.notation import ANY
from moesaic.sharding.proof.examples import Example, is_optional
from moesaic.sharding.proof.report import Report
from moesaic.sharding.proof.values import tried as values_tried
from moesaic.sharding.rule import Rule
from moesaic.sharding.when import as_text, flags_of, hashable, keyword, stands

Op = torch._ops.OpOverload


def made_up(examples: Sequence[Example]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls as the first example with one thing changed that no example has: in words, and the arguments.

    An optional tensor is left out, a flag has its default and the other values that a line of the rule names, a bool is
    turned round, a number moves a little, an int to its neighbours. Of strings it is not known what they may be.
    """
    op = examples[0].op
    if op not in RULES:
        return
    tried = values_tried(examples)
    for argument in op._schema.arguments:
        values = tried[argument.name]
        others = [
            v for line in RULES[op].lines for name, of_line in line.when if name == argument.name for v in of_line
        ]
        others += _others(argument, values)
        for other in dict.fromkeys(others):
            if other not in values and other is not Tensor:
                # The flags of a line go together: what else it names is set to what it says.
                example = next((e for e in examples if _line_of(e, {argument.name: other})), examples[0])
                changed = _line_of(example, {argument.name: other}) or {argument.name: other}
                args = _with(op, example.args, changed)
                if not any(stands(line, flags_of(op, args, {})) for line in RULES[op].lines):
                    continue  # such a call raises
                yield ", ".join(as_text(n, v) for n, v in changed.items()), args


def note_untried(report: Report, examples: Sequence[Example]) -> None:
    """Note what the rule admits and no example has: tensors given or left out, other flags, lines of the rule.

    Nothing is known about any of it. Of torch's own rules, which nobody here has written, it is only a note.
    """
    op = examples[0].op
    rule = RULES.get(op)
    say = report.note if rule is None else report.leave_untried
    tried = values_tried(examples)
    for argument in op._schema.arguments:
        name, values = argument.name, tried[argument.name]
        if is_tensor(argument.type) and Tensor not in values and _admits(rule, name, Tensor):
            say(f"no example gives {name}: nothing was tried with it")
        if isinstance(argument.type, torch.OptionalType) and is_tensor(argument.type):
            if None not in values and f"without {name}" not in report.refused and _admits(rule, name, None):
                say(f"every example gives {name}: nothing was tried without it")
        elif rule is not None and not is_tensor(argument.type):
            _note_flag(report, rule, name, values)
    for example in examples:
        if example.line and ANY in example.line.text:
            report.note(f"'...' stood for dims: {example.line.num_any}")
    reached = {example.line.text for example in examples if example.line}
    for line in rule.lines if rule else ():
        if line.text not in reached:
            # A form at a time is a way to go about it.
            report.note(f"no example uses the line '{line}': it was not tried")


def _note_flag(report: Report, rule: Rule, name: str, tried: Sequence[Any]) -> None:
    said = [dict(line.when).get(name) for line in rule.lines]
    for value in dict.fromkeys(v for values in said if values for v in values):
        if value not in tried and as_text(name, value) not in report.refused:
            report.leave_untried(f"no example has {as_text(name, value)}, which the rule names")
    # A line that cuts nothing is right whatever the flags are; what an operator refuses was offered to it.
    free = [
        line for line, values in zip(rule.lines, said, strict=True) if not values and len(rule.placements(line)) > 1
    ]
    if free and len(tried) == 1:
        report.leave_untried(
            f"every example has {as_text(name, *tried)}: no other value was tried. Give others in also=, or say for "
            f"which values the rule stands: sharding_rule(..., {keyword(name, tried[0])})"
        )


def _admits(rule: Rule | None, name: str, value: Any) -> bool:
    return rule is None or any(value in dict(line.when).get(name, (value,)) for line in rule.lines)


def _others(argument: Any, tried: Sequence[Any]) -> list[Any]:
    """Values that the argument may well have."""
    kind, optional = argument.type, is_optional(argument.type)
    if is_tensor(kind):
        return [None] if optional else []
    kind = kind.getElementType() if optional else kind
    likely = [None] * optional + [hashable(argument.default_value)] * argument.has_default_value()
    if "ScalarType" in str(argument.real_type):  # a schema has dtypes, layouts and memory formats as ints
        return [*likely, torch.float32, torch.float64]
    if isinstance(kind, torch.BoolType):
        return [*likely, False, True]
    # Who gave several values knows better.
    if len(tried) > 1:
        return likely
    if isinstance(kind, torch.ListType):
        return likely + (_moved(tried[0], as_list=True) if tried[0] else [])
    if isinstance(kind, (torch.IntType, torch.FloatType, torch.NumberType)):
        return likely + _moved((0 if tried[0] is None else tried[0],), as_list=False)
    return likely


def _moved(values: tuple[Any, ...], *, as_list: bool) -> list[Any]:
    """Other numbers in the place of these: ints next to them, twice and half as large; floats a little away."""
    if all(isinstance(v, bool) for v in values):
        moved = [tuple(i % 2 == odd for i in range(len(values))) for odd in (0, 1)]
    elif all(type(v) is int for v in values):
        moved = [tuple(map(f, values)) for f in (lambda v: v - 1, lambda v: v + 1, lambda v: 2 * v, lambda v: v // 2)]
    elif all(isinstance(v, (int, float)) for v in values):
        moved = [tuple(v * 1.25 if v else 0.25 for v in values)]
    else:
        moved = []
    return moved if as_list else [v for (v,) in moved]


def _line_of(example: Example, changed: dict[str, Any]) -> dict[str, Any] | None:
    """The flags of a line that names the changed one with its new value, as far as they have to change; or None."""
    flags = flags_of(example.op, example.args, {}) | changed
    for line in RULES[example.op].lines:
        said = dict(line.when)
        if all(value in said.get(name, ()) for name, value in changed.items()):
            if stands(line, flags):
                return changed
            rest = {n: values[0] for n, values in line.when if flags[n] not in values}
            if Tensor not in rest.values():
                return changed | rest
    return None


def _with(op: Op, args: Sequence[Any], changed: dict[str, Any]) -> tuple[Any, ...]:
    values = list(args)
    for i, argument in enumerate(op._schema.arguments):
        if argument.name in changed:
            values += [a.default_value for a in op._schema.arguments[len(values) : i + 1]]
            value = changed[argument.name]
            values[i] = list(value) if isinstance(value, tuple) else value
    return tuple(values)
