"""Find which admitted choice the placements of a call are, one mesh axis at a time.

If there is none, the error says which placements would be admitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from torch import Tensor
from torch.distributed.tensor.placement_types import Partial, Placement, Shard

from moesaic.sharding.notation import Notation
from moesaic.sharding.rule import AxisRule, Placements, Rule, has_one_reduction, short
from moesaic.sharding.sizes import divides


class ShardingError(NotImplementedError, ValueError):
    """An operator was called with DTensors that its sharding rule does not admit.

    A ``NotImplementedError``, as DTensor's own for an operator without a rule: anything else DTensor would wrap.
    """


@dataclass(frozen=True)
class Call:
    """What admission looks at: global metadata alone, so that every rank comes to the same answer.

    Attributes:
        op: name of the operator, for messages.
        axis_names, axis_sizes: of the mesh.
        placements: for each tensor that was given, a placement for each mesh axis.
        numels: how many elements each of them has.
        present: for each of the rule's tensor arguments, whether it was given (optional ones may not be).
        sizes: of the factors.
    """

    op: str
    axis_names: tuple[str, ...]
    axis_sizes: tuple[int, ...]
    placements: tuple[Placements, ...]
    numels: tuple[int, ...]
    present: tuple[bool, ...]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Decision:
    """Where the tensors of a call lie while it is computed.

    Attributes:
        inputs: for each tensor that was given, what it is brought to before; mostly what it is.
        outputs: for each result, what it is.
        results: the results on global shapes, without values.
    """

    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    results: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a call, and what the rule allows for it."""

    name: str
    numel: int
    movable: bool
    additive: bool
    shape_only: bool

    def stays(self, actual: Placement, wanted: Placement) -> bool:
        """Whether it needs no change at all."""
        return actual == wanted or (self.shape_only and isinstance(actual, Partial) and wanted.is_replicate())

    def fits(self, actual: Placement, wanted: Placement) -> bool:
        """Whether it needs no communication."""
        if self.stays(actual, wanted):
            return True
        cut, counted_once = self.movable and type(wanted) is Shard, self.additive and wanted == Partial()
        return actual.is_replicate() and (cut or counted_once)


def admit(rule: Rule, line: Notation, call: Call) -> Decision | None:
    """Where the tensors of a call lie; None if the rule does not admit it."""
    tensors = _tensors(rule, line, call)
    choices = choices_for(rule, line, call.present)
    fitting = []
    for axis in range(len(call.axis_sizes)):
        actual = tuple(p[axis] for p in call.placements)
        fits = [c for c in choices if all(map(_Tensor.fits, tensors, actual, c.inputs))]
        fitting.append(sorted(fits, key=lambda c: _num_changes(tensors, actual, c)))
    # The first that is legal changes least: nearly always the first of all.
    found = next((c for c in product(*fitting) if _is_legal(line, call, c)), None)
    found = found or nearest(rule, line, call, only_movable=True)
    if found is None:
        return None
    inputs = []
    for i, tensor in enumerate(tensors):
        pairs = zip(call.placements[i], (choice.inputs[i] for choice in found), strict=True)
        inputs.append(tuple(a if tensor.stays(a, w) else w for a, w in pairs))
    return Decision(tuple(inputs), tuple(zip(*(choice.outputs for choice in found), strict=True)))


@cache
def choices_for(rule: Rule, line: Notation, present: tuple[bool, ...]) -> list[AxisRule]:
    """The rule's choices for a call that leaves out some arguments, without the choices that depend on those."""
    choices = []
    for choice in rule.placements(line):
        inputs = tuple(p for p, here in zip(choice.inputs, present, strict=True) if here)
        if all(p.is_replicate() for p in inputs) and not all(p.is_replicate() for p in choice.inputs):
            continue
        choices.append(AxisRule(choice.name, inputs, choice.outputs, choice.factor))
    return choices


def nearest(rule: Rule, line: Notation, call: Call, *, only_movable: bool = False) -> tuple[AxisRule, ...] | None:
    """The admitted choice that moves the fewest elements; among equals, the one that changes the fewest tensors.

    None if there is no way there, or ``only_movable`` and only by moving tensors that the rule does not let move.
    """
    tensors = _tensors(rule, line, call)
    if _mixed(tensors, call) or (only_movable and not rule.redistribute):
        return None

    def changes(axis_rules: tuple[AxisRule, ...]) -> tuple[int, int]:
        moved, changed = 0, set()
        for axis, chosen in enumerate(axis_rules):
            for tensor, placements, wanted in zip(tensors, call.placements, chosen.inputs, strict=True):
                if not tensor.fits(placements[axis], wanted):
                    changed.add(tensor.name)
                    moved += 0 if placements[axis].is_replicate() else 1 + tensor.numel
        return moved, len(changed)

    def is_reachable(axis_rules: tuple[AxisRule, ...]) -> bool:
        # DTensor redistributes nothing to Partial.
        return all(
            tensor.fits(placements[axis], wanted)
            or (not isinstance(wanted, Partial) and (tensor.movable or not only_movable))
            for axis, chosen in enumerate(axis_rules)
            for tensor, placements, wanted in zip(tensors, call.placements, chosen.inputs, strict=True)
        )

    combinations = product(choices_for(rule, line, call.present), repeat=len(call.axis_sizes))
    return min((c for c in combinations if is_reachable(c) and _is_legal(line, call, c)), key=changes, default=None)


def _tensors(rule: Rule, line: Notation, call: Call) -> list[_Tensor]:
    given = [(n, p) for n, p, here in zip(rule.tensors, line.inputs, call.present, strict=True) if here]
    return [
        _Tensor(name, numel, name in rule.redistribute, pattern.additive, pattern.shape_only)
        for (name, pattern), numel in zip(given, call.numels, strict=True)
    ]


def _is_legal(line: Notation, call: Call, axis_rules: Sequence[AxisRule]) -> bool:
    """Whether choices for the axes go together: blocks are cut between blocks, and no result is reduced in two ways."""
    results = zip(*(r.outputs for r in axis_rules), strict=True)
    return all(map(has_one_reduction, results)) and divides(line, call.sizes, axis_rules, call.axis_sizes)


def _mixed(tensors: Sequence[_Tensor], call: Call) -> list[str]:
    return [t.name for t, placements in zip(tensors, call.placements, strict=True) if not has_one_reduction(placements)]


def _num_changes(tensors: Sequence[_Tensor], actual: Placements, choice: AxisRule) -> int:
    return sum(not t.stays(a, w) for t, a, w in zip(tensors, actual, choice.inputs, strict=True))


def explain(rule: Rule, line: Notation, call: Call) -> str:
    """Why a call is not admitted: its placements, the nearest admitted ones, and the code that gets there."""
    tensors = _tensors(rule, line, call)
    if mixed := _mixed(tensors, call):
        return f"{call.op}: {mixed[0]} is Partial of two reductions at once, which DTensor cannot redistribute"
    best = nearest(rule, line, call)
    assert best is not None, "everything can be replicated"
    targets = [
        tuple(a if t.fits(a, w) else w for a, w in zip(call.placements[i], (r.inputs[i] for r in best), strict=True))
        for i, t in enumerate(tensors)
    ]
    mesh = ", ".join(f"{n}={s}" for n, s in zip(call.axis_names, call.axis_sizes, strict=True))
    given = ", ".join(f"{t.name} {_show(p)}" for t, p in zip(tensors, call.placements, strict=True))
    wanted = ", ".join(f"{t.name} {_show(p)}" for t, p in zip(tensors, targets, strict=True))
    changed = [(t, p, target) for t, p, target in zip(tensors, call.placements, targets, strict=True) if p != target]
    fixes = [
        f"  {t.name} = {t.name}.redistribute(placements=[{', '.join(map(_code, target))}])" for t, p, target in changed
    ]
    names = [t.name for t, *_ in changed]
    limits = [_limit(line, factor, call.sizes[factor]) for factor in sorted(line.blocks)]
    limits += [f"'{f}' is {call.sizes.get(f, 0)}, cut where each rank has {n} or more" for f, n in line.at_least]
    return "\n".join(
        [
            f"{call.op}: no sharding rule admits {given} on the mesh ({mesh}).",
            f"The rule is '{line}'" + (f"; {'; '.join(limits)}." if limits else "."),
            f"Nearest admitted: {wanted}. To get there:",
            *fixes,
            f"Nothing is redistributed silently; sharding_rule(..., redistribute={names}) allows it.",
        ]
    )


def _limit(line: Notation, factor: str, size: int) -> str:
    """Where a factor may be cut that has to divide evenly."""
    leads = any(d.leading == factor and len(d.factors) > 1 for p in (*line.inputs, *line.outputs) for d in p.dims)
    if leads:
        return f"'{factor}' has {size} blocks, which are cut between blocks only"
    return f"'{factor}' is {size}, cut where it divides evenly"


def _show(placements: Placements) -> str:
    return f"[{', '.join(map(short, placements))}]"


def _code(placement: Placement) -> str:
    if type(placement) is Shard:
        return f"Shard({placement.dim})"
    if isinstance(placement, Partial) and placement.reduce_op != "sum":
        return f'Partial("{placement.reduce_op}")'
    return f"{type(placement).__name__}()"
