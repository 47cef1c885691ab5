"""Small changes of a rule, each of which may make it wrong: what the proof of the rule has to notice."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.distributed.tensor import Partial
from torch.distributed.tensor.placement_types import Placement

from moesaic.sharding.admission import choices_for
from moesaic.sharding.decide import RULES
from moesaic.sharding.notation import REDUCTIONS, Dim, Notation, Pattern
from moesaic.sharding.rule import Rule

Row = tuple[tuple[Placement, ...], tuple[Placement, ...]]


@contextlib.contextmanager
def ruled_by(op: torch._ops.OpOverload, rule: Rule) -> Iterator[None]:
    """Another rule for an operator, for a while."""
    before = RULES[op]
    RULES[op] = rule
    try:
        yield
    finally:
        RULES[op] = before


def rows(rule: Rule, present: tuple[bool, ...]) -> set[Row]:
    """What a rule of one line admits on one axis; of what is read for its shape alone also parts of sums."""
    (line,) = rule.lines
    free = [i for i, pattern in enumerate(line.given(present).inputs) if pattern.shape_only]
    found: dict[tuple[Placement, ...], tuple[Placement, ...]] = {}
    for choice in choices_for(rule, line, present):
        same = [choice.inputs]
        for i in free:
            parts = [Partial(r) for r in REDUCTIONS] if choice.inputs[i].is_replicate() else []
            same += [(*inputs[:i], part, *inputs[i + 1 :]) for inputs in same for part in parts]
        for inputs in same:
            found.setdefault(inputs, choice.outputs)  # of two that fit alike the first is taken
    return set(found.items())


def mutants(rule: Rule) -> Iterator[tuple[str, Rule]]:
    """The changed rules of a rule of one line, by what was changed."""
    (line,) = rule.lines
    for name, changed in _lines(line):
        yield name, replace(rule, lines=(replace(changed, text=f"{line.text} ({name})"),))
    for entry in rule.linear:
        yield f"not linear in {entry}", replace(rule, linear=tuple(e for e in rule.linear if e != entry))
    for tensor in rule.tensors:
        if (tensor,) not in rule.linear:
            yield f"linear in {tensor}", replace(rule, linear=(*rule.linear, (tensor,)))
        yield f"keeps max of {tensor}", replace(rule, preserves=(*rule.preserves, ("max", ((tensor,),))))


def _lines(line: Notation) -> Iterator[tuple[str, Notation]]:
    inner = {f for p in (*line.inputs, *line.outputs) for dim in p.dims for f in dim.factors[1:]}
    for f in sorted(line.whole - inner):
        yield f"{f} without !", replace(line, whole=line.whole - {f})
    for f in line.shardable:
        yield f"{f} with !", replace(line, whole=line.whole | {f})
    for i, pattern in enumerate(line.inputs):
        where = f"input {i}"
        yield f"+ of {where}", _input(line, i, replace(pattern, additive=not pattern.additive, added_to=None))
        yield f"~ of {where}", _input(line, i, replace(pattern, shape_only=not pattern.shape_only))
        for f in sorted(pattern.factors - inner):
            yield f"{f} of {where} dropped", _input(line, i, _renamed(pattern, f))
    for i, pattern in enumerate(line.outputs):
        where = f"output {i}"
        for f in sorted(pattern.factors - inner):
            # A factor of an output alone is whole.
            changed = _output(line, i, _renamed(pattern, f))
            yield f"{f} of {where} dropped", replace(changed, whole=changed.whole | {f"{f}_"})
        others = frozenset(line.shardable) - pattern.factors
        if others:
            for reduction in ("avg", "max"):
                yield f"{reduction} of {where}", _output(line, i, replace(pattern, reduction=reduction))
            yield f"same of {where}", _output(line, i, replace(pattern, same=others - pattern.same))
    for f in sorted(line.blocks):
        yield f"blocks of {f} cut in the middle", replace(line, blocks=line.blocks - {f})


def _input(line: Notation, i: int, pattern: Pattern) -> Notation:
    return replace(line, inputs=(*line.inputs[:i], pattern, *line.inputs[i + 1 :]))


def _output(line: Notation, i: int, pattern: Pattern) -> Notation:
    return replace(line, outputs=(*line.outputs[:i], pattern, *line.outputs[i + 1 :]))


def _renamed(pattern: Pattern, factor: str) -> Pattern:
    dims = tuple(Dim(tuple(f"{f}_" if f == factor else f for f in dim.factors), dim.short) for dim in pattern.dims)
    return replace(pattern, dims=dims)
