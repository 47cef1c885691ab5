"""The notation of sharding rules: text to patterns.

``"(b c) k, (b g) k n, b g -> (b c) n"`` names the dims of every tensor by *factors*, as einops does, with the meaning
of Shardy's sharding rules:

* a factor on an output is parallel: shard it there and on every input that has it;
* a factor on inputs only is summed: shard it on every input that has it, and the outputs are ``Partial``;
* ``k!`` (written once is enough) stays whole;
* ``(b c)`` is one dim of ``b`` blocks of ``c`` rows. It is cut between blocks only, so ``c`` stays whole, and ``b`` is
  sharded only where it divides evenly;
* ``1`` is a dim of size one, never sharded; a tensor without dims is written as nothing.
"""

from dataclasses import dataclass, field


class NotationError(ValueError):
    """A sharding rule that does not parse. The message shows the rule and points at the character."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        super().__init__(f"{problem}\n  {text}\n  {' ' * position}^")
        self.text, self.position, self.problem = text, position, problem


@dataclass(frozen=True)
class Dim:
    """One dim of a tensor: its factors, the outermost first; no factor for a dim of size one."""

    factors: tuple[str, ...]

    @property
    def leading(self) -> str | None:
        """The factor a ``Shard`` of this dim cuts."""
        return self.factors[0] if self.factors else None

    def __str__(self) -> str:
        if not self.factors:
            return "1"
        return self.factors[0] if len(self.factors) == 1 else f"({' '.join(self.factors)})"


@dataclass(frozen=True)
class Pattern:
    """The dims of one tensor."""

    dims: tuple[Dim, ...]

    @property
    def factors(self) -> frozenset[str]:
        return frozenset(f for dim in self.dims for f in dim.factors)

    def dim_led_by(self, factor: str) -> int | None:
        """Which dim a shard of ``factor`` cuts, or None where the tensor does not have it."""
        return next((i for i, dim in enumerate(self.dims) if dim.leading == factor), None)


@dataclass(frozen=True)
class Notation:
    """A parsed rule. ``str()`` gives it back as it was written."""

    text: str
    inputs: tuple[Pattern, ...]
    outputs: tuple[Pattern, ...]
    whole: frozenset[str]
    blocks: frozenset[str] = field(default=frozenset())

    def __str__(self) -> str:
        return self.text

    @property
    def factors(self) -> tuple[str, ...]:
        """Every factor, in the order of first appearance."""
        seen = dict.fromkeys(f for pattern in self.inputs + self.outputs for dim in pattern.dims for f in dim.factors)
        return tuple(seen)

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
    inputs = reader.patterns(0, arrow)
    outputs = reader.patterns(arrow + 2, len(text))
    on_inputs = frozenset().union(*(p.factors for p in inputs))
    inner = {f for p in inputs + outputs for dim in p.dims for f in dim.factors[1:]}
    unbound = frozenset().union(*(p.factors for p in outputs)) - on_inputs - reader.marked - inner
    for factor in sorted(unbound, key=reader.last_seen.__getitem__):
        problem = f"factor '{factor}' is on an output but on no input; a dim of its own stays whole: '{factor}!'"
        raise NotationError(text, reader.last_seen[factor], problem)
    blocks = {dim.leading for p in inputs + outputs for dim in p.dims if len(dim.factors) > 1 and dim.leading}
    return Notation(text, inputs, outputs, frozenset(reader.marked | inner), frozenset(blocks))


class _Reader:
    """Reads patterns out of one rule, keeping what was marked and where each factor stood."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.marked: set[str] = set()
        self.last_seen: dict[str, int] = {}

    def patterns(self, start: int, end: int) -> tuple[Pattern, ...]:
        patterns = []
        while True:
            comma = self.text.find(",", start, end)
            patterns.append(self._pattern(start, end if comma < 0 else comma))
            if comma < 0:
                return tuple(patterns)
            start = comma + 1

    def _pattern(self, start: int, end: int) -> Pattern:
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
                dims.append(Dim(tuple(group)))
                group = None
                i += 1
            elif char == "1" and group is None and not self._is_word(i + 1, end):
                dims.append(Dim(()))
                i += 1
            else:
                name, after = self._factor(i, end)
                if name in seen:
                    raise NotationError(self.text, i, f"factor '{name}' stands twice in one tensor")
                seen.add(name)
                dims.append(Dim((name,))) if group is None else group.append(name)
                i = after
        if group is not None:
            raise NotationError(self.text, group_start, "'(' is never closed")
        return Pattern(tuple(dims))

    def _is_word(self, i: int, end: int) -> bool:
        return i < end and (self.text[i].isalnum() or self.text[i] == "_")

    def _factor(self, start: int, end: int) -> tuple[str, int]:
        i = start
        while self._is_word(i, end):
            i += 1
        name = self.text[start:i]
        if not name.isidentifier():
            raise NotationError(self.text, start, f"expected a factor, '(' or ',', not {self.text[start]!r}")
        self.last_seen[name] = start
        if i < end and self.text[i] == "!":
            self.marked.add(name)
            i += 1
        return name, i
