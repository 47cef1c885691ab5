"""What a proof found, as records and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moesaic.sharding.notation import Notation
from moesaic.sharding.proof.examples import sizes_of
from moesaic.sharding.proof.trial import Case, Trial, show
from moesaic.sharding.rule import Placements

_MOST_ROWS = 40
_MOST_CALLS = 3
_RIGHT, _MOVED = "admitted and right", "redistributed first (hidden communication)"


@dataclass(frozen=True)
class Record:
    """Placements of the inputs and results of a call, and what was found out about them.

    Attributes:
        inputs, outputs: for each tensor, a placement for each mesh axis.
        case: the first in which it was found; ``case.shapes`` are global.
        error: what is wrong, in that case; "" if nothing is.
        line: of the rule, which speaks for the case.
        num_cases: in how many it was found.
    """

    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    case: Case
    error: str = ""
    line: str = ""
    num_cases: int = 1


@dataclass(frozen=True)
class Certainty:
    """How sure it is what was found out about a line of the rule: at these sizes, flags and values, and no others.

    Attributes:
        line: of the rule; "" where torch decides.
        exact: calls of which all results were compared bit for bit, as text: shapes, dtypes, flags.
        num_exact: in how many cases: calls times meshes.
        num_sampled: cases in which results were compared within the rounding of the operator.
        num_shapes: how many shapes these had.
        sizes: of each factor of the line, those that were tried.
    """

    line: str
    exact: tuple[str, ...]
    num_exact: int
    num_sampled: int
    num_shapes: int
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        calls = [*self.exact[:_MOST_CALLS], *([f"{more} more"] if (more := len(self.exact) - _MOST_CALLS) > 0 else [])]
        exact = [f"exact in {self.num_exact} cases: {'; '.join(calls)}"] if calls else ["exact in no case"]
        sampled = f"sampled within rounding in {self.num_sampled} cases of {self.num_shapes} shapes"
        sizes = "; ".join(f"{factor} {', '.join(map(str, of_factor))}" for factor, of_factor in self.sizes)
        texts = [*exact, *([sampled] if self.num_sampled else []), *([f"sizes: {sizes}"] if sizes else [])]
        return "\n".join(f"    {text}" for text in texts)


def certainty_of(line: Notation | None, trials: Sequence[Trial]) -> Certainty:
    """What the trials of a line amount to."""
    exact = [trial for trial in trials if trial.is_exact]
    sampled = [trial for trial in trials if trial.is_exact is False]
    calls = dict.fromkeys(trial.example.as_text() for trial in exact)
    sizes: dict[str, set[int]] = {}
    if line is not None and line.text:
        for example in {id(trial.example): trial.example for trial in trials}.values():
            for factor, n in sizes_of(line, example).items():
                sizes.setdefault(factor, set()).add(n)
    return Certainty(
        line.text if line else "",
        tuple(calls),
        len(exact),
        len(sampled),
        len({trial.example.shapes for trial in sampled}),
        tuple((factor, tuple(sorted(of_factor))) for factor, of_factor in sizes.items()),
    )


@dataclass(repr=False)
class Report:
    """What :func:`moesaic.prove` found. ``print`` shows it as a table.

    Attributes:
        op, rule: name of the operator, and its rule as it was written ("" if torch's own).
        meshes: sizes that ranks were simulated with.
        num_cases: calls times meshes.
        admitted: placements that are admitted and right, without communication.
        wrong: placements that are admitted and give wrong results or gradients: bugs.
        missing: placements that are right in all cases, or in all where sizes divide, and are not admitted.
        hidden: placements for which the inputs are redistributed first.
        stuck: placements that are admitted and right, and whose gradient is refused: the rule of an operator in it
            admits no gradient that lies where it arrives. ``redistribute=`` in that rule lets it be moved.
        untried: what the rule admits and no example tried: nothing is known about it.
        refused: flags and absent tensors that the operator or the rule does not take, as made up for the proof.
        certainty: for each line and kind of call, how results were compared.
        values: what integer tensors had: of what depends on other values nothing is known.
        notes: how it was looked at, and what was left out.
    """

    op: str
    rule: str
    meshes: tuple[tuple[int, ...], ...]
    num_cases: int = 0
    admitted: list[Record] = field(default_factory=list)
    wrong: list[Record] = field(default_factory=list)
    missing: list[Record] = field(default_factory=list)
    hidden: list[Record] = field(default_factory=list)
    stuck: list[Record] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    certainty: list[Certainty] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def leave_untried(self, text: str) -> None:
        """Add what was not tried, once."""
        if text not in self.untried:
            self.untried.append(text)

    @property
    def ok(self) -> bool:
        """Whether something is admitted, all of it was tried, nothing of it is wrong, and no gradient is refused."""
        return bool(self.admitted) and not self.wrong and not self.untried and not self.stuck

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    @property
    def _failure(self) -> str:
        if self.wrong or not self.admitted:
            return "WRONG" if self.wrong else "NOTHING ADMITTED"
        return "GRADIENTS REFUSED" if self.stuck else "NOT ALL TRIED"

    def __repr__(self) -> str:
        kinds = ("admitted", "wrong", "missing", "hidden", *(["stuck"] if self.stuck else []))
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in kinds)
        verdict = "ok" if self.ok else self._failure
        return f"<Report on {self.op}: {verdict}; {counts}>"

    def __str__(self) -> str:
        meshes = ", ".join("x".join(map(str, mesh)) for mesh in self.meshes)
        rule = self.rule.splitlines() or ["none; DTensor's own propagation"]
        header = [f"proof of {self.op}", *(f"  rule   {line}" for line in rule)]
        header += [f"  ranks  {meshes}; {self.num_cases} {'case' if self.num_cases == 1 else 'cases'}"]
        sections = [
            *self._section(_RIGHT, self.admitted),
            *self._section("admitted and WRONG", self.wrong),
            *self._section("right and not admitted", self.missing),
            *self._section(_MOVED, self.hidden),
            *self._section("admitted and right, but the GRADIENT IS REFUSED", self.stuck[:1]),
        ]
        sections += ["", "certainty", *self._certainty()]
        notes = [f"note: {text}" for text in self.notes]
        if len(self.stuck) > 1:
            notes.append(
                f"note: the gradient is refused for {len(self.stuck) - 1} more placements, likely for one reason"
            )
        notes += [f"NOT TRIED: {text}" for text in self.untried]
        verdict = "nothing wrong" if self.ok else f"{len(self.wrong)} WRONG" if self.wrong else self._failure
        verdict += ", nothing missing" if self.complete else f", {len(self.missing)} missing"
        return "\n".join([*header, *sections, *notes, verdict])

    def _certainty(self) -> list[str]:
        lines = []
        for found in self.certainty:
            lines += [f"  {found.line or 'all calls'}", str(found)]
        lines += [f"  values: {'; '.join(self.values)}"] if self.values else []
        return [*lines, "  other sizes, values and flags: not tried"]

    def _section(self, title: str, records: Sequence[Record]) -> list[str]:
        lines = []
        # Calls with and without an optional tensor have a table each.
        for text, names in dict.fromkeys((r.line, r.case.names) for r in records):
            of_line = [r for r in records if (r.line, r.case.names) == (text, names)]
            lines += ["", f"{title}: {text}" if text else title]
            # Of what is as it should be, pairs say nothing that the choices for one axis do not.
            on_one_axis = [r for r in of_line if len(r.case.mesh) == 1]
            hide_pairs = title in (_RIGHT, _MOVED) and len(on_one_axis) > 0
            shown = (on_one_axis if hide_pairs else of_line)[:_MOST_ROWS]
            lines += self._rows(shown)
            if len(shown) < len(of_line):
                lines.append(f"  ... and {len(of_line) - len(shown)} more")
        return lines

    def _rows(self, records: Sequence[Record]) -> list[str]:
        num_outputs = max(len(r.outputs) for r in records)
        names = ["-> y"] if num_outputs == 1 else [f"-> y{i}" for i in range(num_outputs)]
        header = [*records[0].case.names, *names, "cases", "the first"]
        rows = [
            [*map(show, r.inputs), *map(show, r.outputs), *[""] * (num_outputs - len(r.outputs)), str(r.num_cases)]
            for r in records
        ]
        rows = [[*row, str(r.case)] for row, r in zip(rows, records, strict=True)]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
        ]
        for i in reversed(range(len(records))):
            lines[i + 2 : i + 2] = [f"      {text}" for text in records[i].error.splitlines()]
        return lines
