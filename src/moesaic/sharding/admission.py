"""Which admitted choice a call's placements are, axis by axis; and if none, an error that says what would be."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from moesaic.sharding.notation import Notation
from moesaic.sharding.rule import AxisRule, Placements, Rule, divides, short


class ShardingError(NotImplementedError, ValueError):
    """An operator was called with placements that its sharding rule does not admit.

    A ``NotImplementedError``, as DTensor's own for an operator without a rule: anything else DTensor would wrap.
    """


@dataclass(frozen=True)
class Call:
    """What admission looks at: global metadata alone, so that every rank comes to the same answer.

    Attributes:
        op: name of the operator, for messages.
        axis_names, axis_sizes: of the mesh.
        placements: for each tensor argument, a placement for each mesh axis.
        present: for each of the rule's tensor arguments, whether it was given (optional ones may not be).
        sizes: of the factors.
    """

    op: str
    axis_names: tuple[str, ...]
    axis_sizes: tuple[int, ...]
    placements: tuple[Placements, ...]
    present: tuple[bool, ...]
    sizes: dict[str, int]


def admit(rule: Rule, line: Notation, call: Call) -> tuple[AxisRule, ...]:
    """The choice for every axis.

    Raises:
        ShardingError: naming the placements, the nearest admitted ones, and the call that gets there.
    """
    choices = choices_for(rule, line, call.present)
    sliced = tuple(n in rule.sliced for n, p in zip(rule.tensors, call.present, strict=True) if p)
    found: list[AxisRule] = []
    for axis in range(len(call.axis_sizes)):
        actual = tuple(p[axis] for p in call.placements)
        match = next((c for c in choices if c.inputs == actual), None)
        match = match or next((c for c in choices if _fits_sliced(actual, c.inputs, sliced)), None)
        if match is None:
            raise ShardingError(_explain(rule, line, call, choices))
        found.append(match)
    if not divides(line, call.sizes, found, call.axis_sizes):
        raise ShardingError(_explain(rule, line, call, choices))
    return tuple(found)


def choices_for(rule: Rule, line: Notation, present: Sequence[bool]) -> list[AxisRule]:
    """The rule's choices without the optional arguments that were not given, nor those choices that rest on them."""
    choices = []
    for choice in rule.placements(line):
        inputs = tuple(p for p, here in zip(choice.inputs, present, strict=True) if here)
        if all(p.is_replicate() for p in inputs) and not all(p.is_replicate() for p in choice.inputs):
            continue
        choices.append(AxisRule(choice.name, inputs, choice.outputs, choice.factor))
    return choices


def _fits_sliced(actual: Placements, wanted: Placements, sliced: Sequence[bool]) -> bool:
    return all(
        a == w or (s and isinstance(a, Replicate) and isinstance(w, Shard))
        for a, w, s in zip(actual, wanted, sliced, strict=True)
    )


def nearest(line: Notation, call: Call, choices: Sequence[AxisRule]) -> tuple[AxisRule, ...]:
    """The admitted choice that leaves most tensors as they are; of several, the one that gathers least."""

    def changes(axis_rules: tuple[AxisRule, ...]) -> tuple[int, int]:
        pairs = [
            (actual[axis], chosen.inputs[i])
            for axis, chosen in enumerate(axis_rules)
            for i, actual in enumerate(call.placements)
        ]
        changed_tensors = {i for i, p in enumerate(call.placements) if p != tuple(r.inputs[i] for r in axis_rules)}
        gathers = sum(a != w and not isinstance(a, Replicate) for a, w in pairs)
        return gathers, len(changed_tensors)

    def is_reachable(axis_rules: tuple[AxisRule, ...]) -> bool:
        # DTensor redistributes nothing to Partial.
        return all(
            not isinstance(wanted, Partial) or actual[axis] == wanted
            for axis, chosen in enumerate(axis_rules)
            for actual, wanted in zip(call.placements, chosen.inputs, strict=True)
        )

    combinations = product(choices, repeat=len(call.axis_sizes))
    legal = (c for c in combinations if divides(line, call.sizes, c, call.axis_sizes) and is_reachable(c))
    return min(legal, key=changes)


def _explain(rule: Rule, line: Notation, call: Call, choices: Sequence[AxisRule]) -> str:
    names = [n for n, here in zip(rule.tensors, call.present, strict=True) if here]
    best = nearest(line, call, choices)
    targets = [tuple(r.inputs[i] for r in best) for i in range(len(names))]
    mesh = ", ".join(f"{n}={s}" for n, s in zip(call.axis_names, call.axis_sizes, strict=True))
    given = ", ".join(f"{n} {_show(p)}" for n, p in zip(names, call.placements, strict=True))
    wanted = ", ".join(f"{n} {_show(p)}" for n, p in zip(names, targets, strict=True))
    fixes = [
        f"  {n} = {n}.redistribute(placements=[{', '.join(map(str, map(_code, t)))}])"
        for n, p, t in zip(names, call.placements, targets, strict=True)
        if p != t
    ]
    uneven = [f"'{f}' has {call.sizes[f]} blocks, which are cut between blocks only" for f in sorted(line.blocks)]
    return "\n".join(
        [
            f"{call.op}: no sharding rule admits {given} on the mesh ({mesh}).",
            f"The rule is '{line}'" + (f"; {'; '.join(uneven)}." if uneven else "."),
            f"Nearest admitted: {wanted}. To get there:",
            *fixes,
            "Nothing is redistributed silently; sharding_rule(..., redistribute=True) allows it for an operator.",
        ]
    )


def _show(placements: Placements) -> str:
    return f"[{', '.join(map(short, placements))}]"


def _code(placement: Placement) -> str:
    if type(placement) is Shard:
        return f"Shard({placement.dim})"
    return f"{type(placement).__name__}()"
