"""From a parsed rule to the placements it admits, for one mesh axis and for a whole mesh.

Nothing here looks at a local shape: a rule is admitted or dropped on global sizes only, so that every rank decides
alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from moesaic.sharding.notation import Notation, Pattern, parse

Placements = tuple[Placement, ...]
LinearIn = str | tuple[str, ...]


@dataclass(frozen=True)
class AxisRule:
    """One admitted choice for one mesh axis: a placement for every tensor.

    Attributes:
        name: the factor that is sharded, ``"replicate"``, or ``"linear in ..."``.
        inputs, outputs: a placement for each tensor.
        factor: the factor that is sharded, if one is.
    """

    name: str
    inputs: Placements
    outputs: Placements
    factor: str | None = None


@dataclass(frozen=True)
class Rule:
    """All of a rule that does not depend on torch: its lines, and what the op is linear in.

    Attributes:
        lines: alternatives; the first whose patterns fit the shapes of a call speaks for it.
        tensors: names of the tensor arguments, in order.
        linear: each entry, an argument or several jointly, passes ``Partial`` through to the outputs.
        sliced: arguments that may arrive ``Replicate`` where a shard is wanted: cut locally, without communication.
    """

    lines: tuple[Notation, ...]
    tensors: tuple[str, ...]
    linear: tuple[tuple[str, ...], ...] = ()
    sliced: frozenset[str] = frozenset()

    def placements(self, line: Notation | None = None) -> list[AxisRule]:
        """Every admitted choice for one mesh axis, under ``line`` (default: the first)."""
        line = line or self.lines[0]
        rules = [_replicated(line)]
        rules += [_sharded(line, factor) for factor in line.shardable]
        rules += [self._partial(line, names) for names in self.linear]
        return rules

    def table(self, line: Notation | None = None) -> str:
        """The admitted choices as text, a row each."""
        line = line or self.lines[0]
        header = ["on one axis", *self.tensors[: len(line.inputs)], *(f"out{i}" for i in range(len(line.outputs)))]
        rows = [[r.name, *map(short, r.inputs), *map(short, r.outputs)] for r in self.placements(line)]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [header, *rows]]
        return "\n".join(text.rstrip() for text in [str(line), *lines])

    def _partial(self, line: Notation, names: tuple[str, ...]) -> AxisRule:
        inputs = tuple(Partial() if name in names else Replicate() for name in self.tensors[: len(line.inputs)])
        return AxisRule(f"linear in {' + '.join(names)}", inputs, (Partial(),) * len(line.outputs))


def make_rule(
    lines: Sequence[str], tensors: Sequence[str], linear: Sequence[LinearIn] = (), sliced: Sequence[str] = ()
) -> Rule:
    """Parse and check a rule.

    Raises:
        NotationError: a line does not parse.
        ValueError: a line has not one pattern for each tensor argument, or a name is not one of them.
    """
    parsed = tuple(parse(line) for line in lines)
    if not parsed:
        raise ValueError("a sharding rule needs at least one line")
    for line in parsed:
        if len(line.inputs) != len(tensors):
            raise ValueError(
                f"rule '{line}' has {len(line.inputs)} inputs, the operator has {len(tensors)} tensor arguments: "
                f"{', '.join(tensors)}"
            )
        if len(line.outputs) != len(parsed[0].outputs):
            raise ValueError(f"rule '{line}' has another number of outputs than '{parsed[0]}'")
    joint = tuple((names,) if isinstance(names, str) else tuple(names) for names in linear)
    for name in (*(n for names in joint for n in names), *sliced):
        if name not in tensors:
            raise ValueError(f"'{name}' is not a tensor argument of the operator: {', '.join(tensors)}")
    return Rule(parsed, tuple(tensors), joint, frozenset(sliced))


def short(placement: Placement) -> str:
    """``R``, ``S(0)`` or ``P``."""
    if placement.is_replicate():
        return "R"
    if isinstance(placement, Partial):
        return "P" if placement.reduce_op == "sum" else f"P({placement.reduce_op})"
    return f"S({placement.dim})" if type(placement) is Shard else str(placement)


def factor_sizes(
    line: Notation, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> dict[str, int] | None:
    """The size of every factor, or None where the shapes do not fit the patterns."""
    sizes: dict[str, int] = {}
    pairs = list(zip(line.inputs + line.outputs, [*inputs, *outputs], strict=True))
    if any(len(pattern.dims) != len(shape) for pattern, shape in pairs):
        return None
    composite = []
    for pattern, shape in pairs:
        for dim, size in zip(pattern.dims, shape, strict=True):
            if len(dim.factors) > 1:
                composite.append((dim.factors, size))
            elif sizes.setdefault(dim.factors[0] if dim.factors else "1", size) != size:
                return None
    if sizes.pop("1", 1) != 1:
        return None
    while composite:
        solved = [(f, s) for f, s in composite if sum(name not in sizes for name in f) <= 1]
        if not solved:
            return None
        for factors, size in solved:
            known = prod(sizes[name] for name in factors if name in sizes)
            unknown = next((name for name in factors if name not in sizes), None)
            if unknown is not None:
                sizes[unknown] = size // known if known else 0
                known *= sizes[unknown]
            if known != size:
                return None
        composite = [pair for pair in composite if pair not in solved]
    return sizes


def divides(line: Notation, sizes: dict[str, int], axis_rules: Sequence[AxisRule], axis_sizes: Sequence[int]) -> bool:
    """Whether blocks are cut between blocks only: a block factor divides by all the axes it is sharded over."""
    for factor in line.blocks:
        ranks = prod(n for rule, n in zip(axis_rules, axis_sizes, strict=True) if rule.factor == factor)
        if sizes[factor] % ranks:
            return False
    return True


def _replicated(line: Notation) -> AxisRule:
    return AxisRule("replicate", (Replicate(),) * len(line.inputs), (Replicate(),) * len(line.outputs))


def _sharded(line: Notation, factor: str) -> AxisRule:
    inputs = tuple(_place(pattern, factor, Replicate()) for pattern in line.inputs)
    outputs = tuple(_place(pattern, factor, Partial()) for pattern in line.outputs)
    return AxisRule(factor, inputs, outputs, factor)


def _place(pattern: Pattern, factor: str, otherwise: Placement) -> Placement:
    dim = pattern.dim_led_by(factor)
    return otherwise if dim is None else Shard(dim)
