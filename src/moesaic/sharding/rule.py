"""From a parsed rule to the placements it admits, for one mesh axis and for a whole mesh.

Nothing here looks at a local shape: a rule is admitted or dropped on global sizes only, so that every rank decides
alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from moesaic.sharding.notation import REDUCTIONS, Condition, Notation, Pattern, check_sizes_are_told, parse
from moesaic.sharding.when import said

Placements = tuple[Placement, ...]
Joint = str | tuple[str, ...]


@dataclass(frozen=True)
class AxisRule:
    """One admitted choice for one mesh axis: a placement for every tensor.

    Attributes:
        name: the factor that is sharded, ``"replicate"``, or what passes through, as in ``"linear in x"``.
        inputs, outputs: a placement for each tensor.
        factor: the factor that is sharded, if one is.
    """

    name: str
    inputs: Placements
    outputs: Placements
    factor: str | None = None


class PlacementTable(tuple[AxisRule, ...]):
    """The admitted choices of one line of a rule; ``print`` shows them as a table, a row each."""

    line: Notation
    tensors: tuple[str, ...]
    results: tuple[str, ...]

    def __new__(
        cls, rules: Sequence[AxisRule], line: Notation, tensors: Sequence[str], results: Sequence[str]
    ) -> "PlacementTable":
        table = super().__new__(cls, rules)
        table.line, table.tensors, table.results = line, tuple(tensors), tuple(results)
        return table

    def __str__(self) -> str:
        header = ["on one axis", *self.tensors, *self.results]
        rows = [[r.name, *map(short, r.inputs), *map(short, r.outputs)] for r in self]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [header, *rows]]
        return "\n".join(text.rstrip() for text in [str(self.line), *lines])

    __repr__ = __str__


@dataclass(frozen=True)
class Rule:
    """All of a rule that does not depend on torch. ``str()`` gives its lines back as they were written.

    Attributes:
        lines: alternatives; the first whose patterns fit the shapes of a call speaks for it.
        tensors, results: names of the tensor arguments and of the results, in order.
        linear: each entry, an argument or several jointly, passes ``Partial`` through to the outputs.
        preserves: a reduction such as ``"max"``, and the arguments that pass ``Partial("max")`` through.
        redistribute: arguments that DTensor may bring to the nearest admitted placements.
    """

    lines: tuple[Notation, ...]
    tensors: tuple[str, ...]
    results: tuple[str, ...]
    linear: tuple[tuple[str, ...], ...] = ()
    preserves: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    redistribute: frozenset[str] = frozenset()

    def __str__(self) -> str:
        # Where lines differ in them, they say so themselves.
        flags = {said(line) for line in self.lines}
        of_all = [f"when {text}" for text in flags if text and len(flags) == 1]
        return "\n".join([*map(str, self.lines), *of_all])

    def placements(self, line: Notation | None = None) -> PlacementTable:
        """Every admitted choice for one mesh axis, under ``line`` (default: the first)."""
        line = line or self.lines[0]
        rules = [_replicated(line), *(self.sharded(line, factor) for factor in line.shardable)]
        rules += [self._through(line, names, reduction, verb) for names, reduction, verb in self._pass_through(line)]
        unique = {rule.inputs: rule for rule in reversed(rules)}
        return PlacementTable([r for r in rules if unique[r.inputs] is r], line, self.tensors, self.results)

    def sharded(self, line: Notation, factor: str) -> AxisRule:
        """The choice that cuts ``factor`` wherever ``line`` has it."""
        outputs = tuple(_place(pattern, factor, _part_of(pattern, factor)) for pattern in line.outputs)
        term = Partial() if Partial() in outputs else Replicate()
        inputs = tuple(_place(p, factor, term if _is_added_to(p, factor) else Replicate()) for p in line.inputs)
        return AxisRule(factor, inputs, outputs, factor)

    def terms(self, line: Notation | None = None) -> tuple[str, ...]:
        """Arguments that are added to results and count once, under ``line`` (default: the first)."""
        inputs = (line or self.lines[0]).inputs
        return tuple(name for name, pattern in zip(self.tensors, inputs, strict=True) if pattern.additive)

    def _pass_through(self, line: Notation) -> list[tuple[tuple[str, ...], str, str]]:
        """Which arguments pass which reduction through to the outputs."""
        # A term that is added to some sums alone is named in `linear` where it belongs.
        patterns = zip(self.tensors, line.inputs, strict=True)
        terms = tuple(name for name, p in patterns if p.additive and p.added_to is None)
        entries = [tuple(dict.fromkeys((*names, *terms))) for names in self.linear]
        passes = [(names, "sum", "linear") for names in entries]
        # A mean of results is the result of the mean, whatever else stays the same: any part of what is jointly linear.
        subsets = [s for names in entries for n in range(1, len(names) + 1) for s in combinations(names, n)]
        passes += [(names, "avg", "mean") for names in subsets]
        # What is added to the largest term is added to all of them.
        passes += [((name,), reduction, reduction) for reduction in ("max", "min") for name in terms]
        passes += [(names, reduction, reduction) for reduction, joint in self.preserves for names in joint]
        return passes

    def _through(self, line: Notation, names: tuple[str, ...], reduction: str, verb: str) -> AxisRule:
        inputs = tuple(Partial(reduction) if name in names else Replicate() for name in self.tensors)
        return AxisRule(f"{verb} in {' + '.join(names)}", inputs, (Partial(reduction),) * len(line.outputs))


def make_rule(
    lines: Sequence[str],
    tensors: Sequence[str],
    results: Sequence[str] | None = None,
    *,
    linear: Sequence[Joint] = (),
    preserves: Mapping[str, Sequence[Joint]] | None = None,
    redistribute: bool | Sequence[str] = False,
    when: Sequence[tuple[Condition, ...]] = (),
    at_least: Mapping[str, int] | None = None,
) -> Rule:
    """Parse and check a rule.

    Args:
        lines: as written.
        tensors, results: names of the tensor arguments and of the results; by default ``out0``, ``out1``, ...
        linear, preserves, redistribute, at_least: see :func:`moesaic.sharding_rule`.
        when: for each line the flags that it stands for; none by default.

    Raises:
        NotationError: a line does not parse.
        ValueError: a line has not one pattern for each tensor argument and result, or a name is not an argument's.
    """
    parsed = tuple(parse(line) for line in lines)
    if not parsed:
        raise ValueError("a sharding rule needs at least one line")
    for line in parsed:
        check_sizes_are_told(line)
        if len(line.inputs) != len(tensors):
            raise ValueError(
                f"rule '{line}' has {len(line.inputs)} inputs, the operator has {len(tensors)} tensor arguments: "
                f"{', '.join(tensors)}"
            )
        if len(line.outputs) != len(parsed[0].outputs):
            raise ValueError(f"rule '{line}' has another number of outputs than '{parsed[0]}'")
    num_outputs = len(parsed[0].outputs)
    results = [f"out{i}" for i in range(num_outputs)] if results is None else results
    if len(results) != num_outputs:
        raise ValueError(f"rule '{parsed[0]}' has {num_outputs} outputs, the operator returns {len(results)}")
    preserves = preserves or {}
    if isinstance(redistribute, bool):
        redistribute = tensors if redistribute else ()
    for reduction in preserves:
        if reduction == "sum" or reduction not in REDUCTIONS:
            hint = "say linear= for sums" if reduction == "sum" else f"choose one of {', '.join(REDUCTIONS[1:])}"
            raise ValueError(f"preserves: {reduction!r} is not a reduction it takes; {hint}")
    for option, names in {"linear": linear, **preserves, "redistribute": redistribute}.items():
        if isinstance(names, str):
            raise ValueError(f"{option}: expected a list of names, got the string {names!r}; write [{names!r}]")
    preserved = tuple((reduction, _joint(names)) for reduction, names in preserves.items())
    linear = _joint(linear)
    for name in (*chain.from_iterable(chain(linear, *(names for _, names in preserved))), *redistribute):
        if name not in tensors:
            raise ValueError(f"'{name}' is not a tensor argument of the operator: {', '.join(tensors)}")
    least = dict(at_least or {})
    for factor, n in least.items():
        if not any(factor in line.shardable for line in parsed):
            raise ValueError(f"at_least: no line cuts '{factor}': {', '.join(map(str, parsed))}")
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"at_least: '{factor}' is {n!r}; give how much of it every rank has to have, 1 or more")
    when = when or [()] * len(parsed)
    parsed = tuple(
        replace(line, when=flags, at_least=tuple((f, n) for f, n in least.items() if f in line.factors))
        for line, flags in zip(parsed, when, strict=True)
    )
    if len({*when}) > 1:  # lines may differ in them alone
        parsed = tuple(replace(line, text=f"{line} when {said(line)}") if line.when else line for line in parsed)
    return Rule(parsed, tuple(tensors), tuple(results), linear, preserved, frozenset(redistribute))


def short(placement: Placement) -> str:
    """``R``, ``S(0)``, ``P`` or ``P(max)``."""
    if placement.is_replicate():
        return "R"
    if isinstance(placement, Partial):
        return "P" if placement.reduce_op == "sum" else f"P({placement.reduce_op})"
    return f"S({placement.dim})" if type(placement) is Shard else str(placement)


def has_one_reduction(placements: Placements) -> bool:
    """Whether DTensor has such a tensor. Sums and means may be taken in any order, so they may stand together."""
    return len({p.reduce_op.replace("avg", "sum") for p in placements if isinstance(p, Partial)}) <= 1


def _joint(names: Sequence[Joint]) -> tuple[tuple[str, ...], ...]:
    return tuple((entry,) if isinstance(entry, str) else tuple(entry) for entry in names)


def _replicated(line: Notation) -> AxisRule:
    return AxisRule("replicate", (Replicate(),) * len(line.inputs), (Replicate(),) * len(line.outputs))


def _part_of(output: Pattern, factor: str) -> Placement:
    """What a rank has of an output without the factor that is sharded."""
    return Replicate() if factor in output.same else Partial(output.reduction)


def _is_added_to(term: Pattern, factor: str) -> bool:
    return term.additive and (term.added_to is None or factor in term.added_to)


def _place(pattern: Pattern, factor: str, otherwise: Placement) -> Placement:
    dim = pattern.dim_led_by(factor)
    return otherwise if dim is None else Shard(dim)
