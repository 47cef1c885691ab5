"""The notation of sharding rules: text to patterns.

``"(b c) k, (b g) k n, b g -> (b c) n"`` names the dims of every tensor by *factors*, as einops does, with the meaning
of Shardy's sharding rules:

* a factor on an output is parallel: shard it there and on every input that has it;
* a factor on inputs only is summed: shard it on every input that has it, and the outputs are ``Partial``.
  ``max: m`` before the dims of an output says how its parts are reduced instead (``max``, ``min``, ``avg`` or ``sum``);
* ``k!`` (written once is enough) stays whole;
* ``k%`` (written once is enough) is cut only where it divides evenly, as a mean of means has to be;
* ``...`` is any number of dims, none included, the same wherever it stands;
* ``(b c)`` is one dim of ``b`` blocks of ``c`` rows. It is cut between blocks only, so ``c`` stays whole, and ``b`` is
  sharded only where it divides evenly. ``(b g)?`` may end early, its last blocks incomplete or missing;
* ``1`` is a dim of size one, never sharded; a tensor without dims is written as nothing;
* ``+n`` before the dims of an input is a term that is added to the result, such as a bias. Where the result is
  ``Partial`` so has the term to be, or it would be counted on every rank; one that is replicated counts on the first.
  ``+k: n`` is added to the sum over ``k`` only: where another factor is sharded, every rank needs the whole term;
* ``same k: m n`` is an output that does not depend on ``k``: where ``k`` is sharded, each rank has all of it;
* ``~m k`` is an input of which only the shape is read, not the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

REDUCTIONS = ("sum", "avg", "max", "min")
ANY = "..."

# A flag, and the values of it that a line stands for.
Condition = tuple[str, tuple[Any, ...]]


class NotationError(ValueError):
    """A sharding rule that does not parse. The message shows the rule and points at the character."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        super().__init__(f"{problem}\n  {text}\n  {' ' * position}^")
        self.text, self.position, self.problem = text, position, problem


@dataclass(frozen=True)
class Dim:
    """One dim of a tensor: its factors, the outermost first; no factor for a dim of size one.

    Attributes:
        short: whether the last blocks may be incomplete or missing.
    """

    factors: tuple[str, ...]
    short: bool = False

    @property
    def leading(self) -> str | None:
        """The factor a ``Shard`` of this dim cuts."""
        return self.factors[0] if self.factors else None

    def __str__(self) -> str:
        if not self.factors:
            return "1"
        if len(self.factors) == 1:
            return self.factors[0]
        return f"({' '.join(self.factors)}){'?' * self.short}"


@dataclass(frozen=True)
class Pattern:
    """The dims of one tensor, and what marks it.

    Attributes:
        additive: an input that is added to the result.
        added_to: the factors over whose sum it is added; None for all.
        same: factors that an output does not depend on.
        shape_only: an input whose values are not read.
        reduction: how the parts of an output are reduced where a factor that it has not is sharded.
    """

    dims: tuple[Dim, ...]
    additive: bool = False
    shape_only: bool = False
    reduction: str = "sum"
    added_to: frozenset[str] | None = None
    same: frozenset[str] = frozenset()

    @property
    def factors(self) -> frozenset[str]:
        return frozenset(f for dim in self.dims for f in dim.factors)

    def expand(self, factors: Sequence[str]) -> "Pattern":
        """With these factors, a dim each, in the place of ``...``."""
        dims = [[Dim((f,)) for f in factors] if dim.factors == (ANY,) else [dim] for dim in self.dims]
        return replace(self, dims=tuple(dim for some in dims for dim in some))

    def dim_led_by(self, factor: str) -> int | None:
        """Which dim a shard of ``factor`` cuts, or None where the tensor does not have it."""
        return next((i for i, dim in enumerate(self.dims) if dim.leading == factor), None)


@dataclass(frozen=True)
class Notation:
    """A parsed line of a rule. ``str()`` gives it back as it was written.

    Attributes:
        whole: factors that are never cut.
        blocks: factors that are cut only where they divide evenly: of blocks, or marked so.
        when: flags, and the values of them that the line stands for.
        at_least: factors, and how much of them every rank has to have where they are cut.
    """

    text: str
    inputs: tuple[Pattern, ...]
    outputs: tuple[Pattern, ...]
    whole: frozenset[str]
    blocks: frozenset[str] = field(default=frozenset())
    when: tuple[Condition, ...] = ()
    at_least: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def factors(self) -> tuple[str, ...]:
        """Every factor, in the order of first appearance."""
        seen = dict.fromkeys(f for pattern in self.inputs + self.outputs for dim in pattern.dims for f in dim.factors)
        return tuple(seen)

    def given(self, present: Sequence[bool]) -> "Notation":
        """The rule without the inputs that a call does not give."""
        inputs = tuple(pattern for pattern, here in zip(self.inputs, present, strict=True) if here)
        return self if all(present) else replace(self, inputs=inputs)

    def spread(self, num_dims: Sequence[int]) -> "Notation | None":
        """The line with as many factors in the place of ``...`` as tensors of so many dims need; None if none fits."""
        pairs = zip(self.inputs + self.outputs, num_dims, strict=True)
        counts = {n - len(pattern.dims) + 1 for pattern, n in pairs if ANY in pattern.factors}
        if len(counts) > 1 or min(counts, default=0) < 0:
            return None
        return self.expand(*counts) if counts else self

    @property
    def num_any(self) -> int:
        """How many factors stand in the place of ``...``."""
        return sum(f.startswith(ANY) for f in self.factors)

    def expand(self, count: int) -> "Notation":
        """The line with so many factors in the place of ``...``, where it has that."""
        if ANY not in self.factors:
            return self
        factors = tuple(f"{ANY}{i + 1}" for i in range(count))
        inputs, outputs = (tuple(p.expand(factors) for p in patterns) for patterns in (self.inputs, self.outputs))
        whole = self.whole - {ANY} | set(factors) if ANY in self.whole else self.whole
        return replace(self, inputs=inputs, outputs=outputs, whole=frozenset(whole))

    @property
    def shardable(self) -> tuple[str, ...]:
        """The factors that may be sharded: all but the whole ones."""
        return tuple(f for f in self.factors if f not in self.whole)


def parse(text: str) -> Notation:
    """Parse one line of the notation.

    Raises:
        NotationError: pointing at the character that is wrong.

    Example:
        >>> parse("m k, k n -> m n").shardable
        ('m', 'k', 'n')
    """
    arrow = text.find("->")
    if arrow < 0:
        raise NotationError(text, len(text), "a rule needs '->' between inputs and outputs")
    if (second := text.find("->", arrow + 2)) >= 0:
        raise NotationError(text, second, "a rule has one '->'")
    reader = _Reader(text)
    inputs = reader.patterns(0, arrow, is_output=False)
    outputs = reader.patterns(arrow + 2, len(text), is_output=True)
    on_inputs = frozenset().union(*(p.factors for p in inputs))
    inner = {f for p in inputs + outputs for dim in p.dims for f in dim.factors[1:]}
    unbound = frozenset().union(*(p.factors for p in outputs)) - on_inputs - reader.marked - inner
    for factor in sorted(unbound, key=reader.last_seen.__getitem__):
        problem = f"factor '{factor}' is on an output but on no input; a dim of its own stays whole: '{factor}!'"
        if set(factor) <= set("".join(on_inputs)) and (apart := with_spaces(text)):
            problem = f"factor '{factor}' is on an output but on no input; to name two dims write '{apart}'"
        raise NotationError(text, reader.last_seen[factor], problem)
    for factor in reader.in_marks.keys() - on_inputs:
        raise NotationError(text, reader.in_marks[factor], f"factor '{factor}' is on no input")
    blocks = {dim.leading for p in inputs + outputs for dim in p.dims if len(dim.factors) > 1 and dim.leading}
    if both := (reader.marked | inner) & reader.even:
        raise NotationError(text, text.index("%"), f"factor '{min(both)}' stays whole, so it is cut nowhere")
    return Notation(text, inputs, outputs, frozenset(reader.marked | inner), frozenset(blocks | reader.even))


def with_spaces(text: str) -> str | None:
    """A rule of words with the letters apart, as einsum takes them: ``m k, k n -> m n``; None if it has no such words.

    Example:
        >>> with_spaces("mk,kn->mn")
        'm k, k n -> m n'
    """
    patterns = [side.split(",") for side in text.split("->")]
    words = [pattern.strip() for side in patterns for pattern in side]
    if not all(word.isalpha() or not word for word in words) or max(map(len, words)) < 2:
        return None
    return " -> ".join(", ".join(" ".join(pattern.strip()) for pattern in side) for side in patterns)


def check_sizes_are_told(line: Notation) -> None:
    """Raise ``NotationError`` unless the size of every factor follows from the shapes of a call.

    That of a block needs another dim, on any tensor, that tells it; one factor of a dim may be told by that dim alone.
    """
    dims = {dim for pattern in line.inputs + line.outputs for dim in pattern.dims}
    told = {dim.factors[0] for dim in dims if len(dim.factors) == 1}
    left = {dim for dim in dims if len(dim.factors) > 1 and not dim.short}
    while solved := {dim for dim in left if sum(f not in told for f in dim.factors) <= 1}:
        told |= {f for dim in solved for f in dim.factors}
        left -= solved
    left |= {dim for dim in dims if dim.short and not told.issuperset(dim.factors)}
    for dim in sorted(left, key=str):
        untold = " and ".join(f"'{f}'" for f in dim.factors if f not in told)
        raise NotationError(line.text, line.text.index("("), f"no dim tells the size of {untold}, of {dim}")


class _Reader:
    """Reads patterns out of one rule, keeping what was marked and where each factor stood."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.marked: set[str] = set()
        self.even: set[str] = set()
        self.last_seen: dict[str, int] = {}
        self.in_marks: dict[str, int] = {}

    def patterns(self, start: int, end: int, *, is_output: bool) -> tuple[Pattern, ...]:
        patterns = []
        while True:
            comma = self.text.find(",", start, end)
            stop = end if comma < 0 else comma
            patterns.append(self._output(start, stop) if is_output else self._input(start, stop))
            if comma < 0:
                return tuple(patterns)
            start = comma + 1

    def _input(self, start: int, end: int) -> Pattern:
        first = self._skip_space(start, end)
        mark = self.text[first : first + 1] if first < end else ""
        if (colon := self.text.find(":", start, end)) >= 0:
            if mark != "+":
                raise NotationError(self.text, colon, "a reduction stands before an output, not an input")
            pattern = Pattern(self._dims(colon + 1, end), additive=True)
            return replace(pattern, added_to=self._factors_of_mark(first + 1, colon, pattern))
        if mark not in ("+", "~"):
            return Pattern(self._dims(start, end))
        return Pattern(self._dims(first + 1, end), additive=mark == "+", shape_only=mark == "~")

    def _output(self, start: int, end: int) -> Pattern:
        first = self._skip_space(start, end)
        if first < end and self.text[first] in "+~":
            raise NotationError(self.text, first, f"'{self.text[first]}' marks an input, not an output")
        colon = self.text.find(":", start, end)
        if colon < 0:
            return Pattern(self._dims(start, end))
        reduction, *factors = self.text[start:colon].split() or [""]
        if reduction == "same" and factors:
            pattern = Pattern(self._dims(colon + 1, end))
            return replace(pattern, same=self._factors_of_mark(first + len("same"), colon, pattern))
        if reduction not in REDUCTIONS or factors:
            known = f"one of {', '.join(REDUCTIONS)}, or same and factors,"
            raise NotationError(self.text, first, f"expected {known} before ':'")
        return Pattern(self._dims(colon + 1, end), reduction=reduction)

    def _factors_of_mark(self, start: int, end: int, pattern: Pattern) -> frozenset[str]:
        """The factors between a mark and its colon. The rule has them elsewhere, and the tensor itself has not."""
        factors = {}
        i = self._skip_space(start, end)
        while i < end:
            name, after = self._factor(i, end)
            if name in pattern.factors:
                raise NotationError(self.text, i, f"factor '{name}' is a dim of this tensor, so it depends on it")
            factors[name] = i
            i = self._skip_space(after, end)
        self.in_marks |= factors
        return frozenset(factors)

    def _skip_space(self, start: int, end: int) -> int:
        while start < end and self.text[start].isspace():
            start += 1
        return start

    def _dims(self, start: int, end: int) -> tuple[Dim, ...]:
        dims: list[Dim] = []
        group: list[str] | None = None
        group_start = start
        seen: set[str] = set()
        i = start
        while i < end:
            char = self.text[i]
            if char.isspace():
                i += 1
            elif char == "(":
                if group is not None:
                    raise NotationError(self.text, i, "'(' inside '('")
                group, group_start = [], i
                i += 1
            elif char == ")":
                if group is None:
                    raise NotationError(self.text, i, "')' without '('")
                if len(group) < 2:
                    raise NotationError(self.text, group_start, "'(...)' needs at least two factors")
                i += 1
                short = i < end and self.text[i] == "?"
                dims.append(Dim(tuple(group), short))
                group = None
                i += short
            elif char == "1" and group is None and not self._is_word(i + 1, end):
                dims.append(Dim(()))
                i += 1
            else:
                name, after = self._factor(i, end)
                if name == ANY and group is not None:
                    raise NotationError(self.text, i, "'...' inside '('")
                if name in seen:
                    raise NotationError(self.text, i, f"factor '{name}' stands twice in one tensor")
                seen.add(name)
                dims.append(Dim((name,))) if group is None else group.append(name)
                i = after
        if group is not None:
            raise NotationError(self.text, group_start, "'(' is never closed")
        return tuple(dims)

    def _is_word(self, i: int, end: int) -> bool:
        return i < end and (self.text[i].isalnum() or self.text[i] == "_")

    def _factor(self, start: int, end: int) -> tuple[str, int]:
        i = start
        while self._is_word(i, end):
            i += 1
        name = self.text[start:i]
        if i == start and self.text[start:end].startswith(ANY):
            name, i = ANY, start + len(ANY)
        if not name.isidentifier() and name != ANY:
            raise NotationError(self.text, start, f"expected a factor, '(' or ',', not {self.text[start]!r}")
        self.last_seen[name] = start
        if i < end and self.text[i] == "!":
            self.marked.add(name)
            i += 1
        elif i < end and self.text[i] == "%":
            self.even.add(name)
            i += 1
        return name, i
