"""What is wrong with a tensor that ranks have, by comparing it with the one process: the fault by its name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.testing.layout import Layout
from moesaic.testing.place import take
from moesaic.testing.record import Index


@dataclass(frozen=True)
class Verdict:
    """A fault by its kind, what was seen, the axes that explain it, and how far the value is from the right one.

    Kinds: ``factor``, ``own part``, ``own mean``, ``wrong group``, ``term``, ``tokens``, ``batches``,
    ``replicas differ``, ``missing``, ``unrelated``.
    """

    kind: str
    text: str
    axes: tuple[str, ...] = ()
    error: float = 0.0
    factor: float | None = None


@dataclass(frozen=True)
class Subject:
    """A value of the one process, and what each rank has of it.

    Attributes:
        whole: the value of the one process.
        parts: for each rank its part and the index of it; None where it has none.
        tolerance: the 2-norm of a difference that counts.
        terms: terms whose sum ``whole`` is, by name.
        has_part: ranks that have the value in principle, such as those of one pipeline stage.
        shares: what one process gets from the batch of each rank alone, or nothing.
    """

    whole: Tensor
    parts: Sequence[tuple[Tensor, Index] | None]
    tolerance: float
    terms: Mapping[str, Tensor]
    has_part: Sequence[bool]
    shares: Sequence[Tensor] = ()


class _Case(NamedTuple):
    """A subject whose ranks have ``values`` where ``expected`` should be."""

    subject: Subject
    values: Mapping[int, Tensor]
    expected: Mapping[int, Tensor]
    layout: Layout
    groups: Mapping[str, list[list[int]]]

    def total(self, group: Sequence[int]) -> Tensor:
        """The sum of what the ranks of a group have."""
        return torch.stack([self.values[r] for r in group]).sum(0)

    def copies(self, partition: Sequence[Sequence[int]]) -> bool:
        """Whether the ranks of each group all have the same part."""
        return all(equal_index(self.part_of(r), self.part_of(group[0])) for group in partition for r in group)

    def complete(self, partition: Sequence[Sequence[int]]) -> bool:
        """Whether every rank has something."""
        return all(r in self.values for group in partition for r in group)

    def copies_there(self, partition: Sequence[Sequence[int]]) -> bool:
        """Whether every rank has something, and the ranks of each group the same part."""
        return self.complete(partition) and self.copies(partition)

    def part_of(self, rank: int) -> Index:
        part = self.subject.parts[rank]
        assert part is not None
        return part[1]


def error_of(subject: Subject) -> float:
    """The largest error of a rank, in units of the tolerance; 0 where there is nothing to compare."""
    errors = [float((t.double() - take(subject.whole, i)).norm()) for t, i in filter(None, subject.parts)]
    return max(errors, default=0.0) / subject.tolerance if subject.tolerance else 0.0


def judge(subject: Subject, layout: Layout, groups: Mapping[str, list[list[int]]]) -> Verdict | None:
    """The fault, or None where every rank has what it should have."""
    missing = [r for r, part in enumerate(subject.parts) if part is None and subject.has_part[r]]
    present = {r: part for r, part in enumerate(subject.parts) if part is not None}
    if missing and float(subject.whole.norm()) > subject.tolerance:
        who = "no rank" if not present else f"not on rank {_list(missing)}"
        return Verdict("missing", f"there is none: {who} has it", error=float(subject.whole.norm()))
    values = {r: t.double() for r, (t, _) in present.items()}
    expected = {r: take(subject.whole, index) for r, (_, index) in present.items()}
    errors = {r: float((values[r] - expected[r]).norm()) for r in values}
    if all(e <= subject.tolerance for e in errors.values()):  # also refuses NaN
        return None
    error = max(errors.values(), key=lambda e: e if e == e else float("inf"))
    for find in (_factor, _sum_over, _by_terms, _by_tokens, _wrong_group, _differing_replicas):
        if verdict := find(_Case(subject, values, expected, layout, groups)):
            return Verdict(verdict.kind, verdict.text, verdict.axes, error, verdict.factor)
    finite = all(bool(v.isfinite().all()) for v in values.values())
    text = "is not related to that of one process" if finite else "is not finite"
    return Verdict("unrelated", text, error=error)


def _ratio(value: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """``c`` where ``value = c * expected`` within the tolerance."""
    size = float(expected.square().sum())
    if size == 0:
        return None
    c = float((value * expected).sum()) / size
    return c if float((value - c * expected).norm()) <= tolerance * max(1.0, abs(c)) else None


def _common_ratio(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> float | None:
    """One ratio of all pairs, leaving out those where there is nothing to compare."""
    ratios = []
    for value, expected in pairs:
        if float(expected.norm()) <= tolerance:
            if float(value.norm()) > tolerance:
                return None
            continue
        ratio = _ratio(value, expected, tolerance)
        if ratio is None:
            return None
        ratios.append((ratio, tolerance / float(expected.norm())))
    if not ratios:
        return None
    c = ratios[0][0]
    return c if all(abs(r - c) <= 2 * (t + ratios[0][1]) * max(1, abs(c)) for r, t in ratios) else None


def _factor(case: _Case) -> Verdict | None:
    c = _common_ratio([(case.values[r], case.expected[r]) for r in case.values], case.subject.tolerance)
    if c is None:
        return None
    names, axes = name_factor(c, case.layout)
    # A factor comes from axes whose ranks hold copies, where there is such an axis.
    copied = {n for names_of, p in case.groups.items() if case.copies_there(p) for n in names_of.split(" or ")}
    axes = tuple(a for a in axes if a in copied) or axes
    if c == 0 or abs(c) < 1e-9:
        return Verdict("factor", "is zero", (), factor=0.0)
    return Verdict("factor", f"is {names} the right one", axes, factor=c)


def name_factor(c: float, layout: Layout) -> tuple[str, tuple[str, ...]]:
    """A factor in words, with ``{axes}`` for the axes whose size it is, and these."""
    sizes = layout.factors()
    times = tuple(n for n, size in sizes.items() if _near(c, size))
    parts = tuple(n for n, size in sizes.items() if _near(c, 1 / size))
    short = f"{c:.4g}"
    if times:
        return f"{short} times ({{axes}} = {round(c)})", times
    if parts:
        return f"{short} times (1 / {{axes}} = 1/{round(1 / c)})", parts
    return f"{short} times", ()


def _near(a: float, b: float | int) -> bool:
    return abs(a - b) <= 1e-3 * abs(b)


def _sum_over(case: _Case) -> Verdict | None:
    """Ranks hold addends: their sum over some axes is the right value, or a multiple."""
    found: list[tuple[str, float, int]] = []
    for names, partition in case.groups.items():
        if not case.copies_there(partition):
            continue
        size = len(partition[0])
        c = _common_ratio([(case.total(g), case.expected[g[0]]) for g in partition], case.subject.tolerance * size)
        if c is not None and abs(c) > 1e-9:
            found.append((names, c, size))
    if not found:
        return _own_terms(case)
    # The fewest ranks; then a plain sum, then a plain mean, before some other multiple.
    names, c, size = min(found, key=lambda f: (f[2], not _near(f[1], 1), not _near(f[1], f[2])))
    equal_fit = [f[0] for f in found if f[2] == size and _near(f[1], c)]
    axes = tuple(" or ".join(equal_fit).split(" or "))
    if _near(c, 1):
        return Verdict("own part", "is each rank's own part: not summed over {axes}", axes, factor=1.0)
    if _near(c, size):
        return Verdict("own mean", "is each rank's own mean: not averaged over {axes}", axes, factor=c)
    said, others = name_factor(c, case.layout)
    said = said.format(axes=" or ".join(others))
    return Verdict(
        "wrong group", f"is not summed over {{axes}}; that sum would be {said} the right one", axes, factor=c
    )


def _own_terms(case: _Case) -> Verdict | None:
    """One term of the loss gives each rank its own part, and another the whole."""
    if len(case.subject.terms) < 2:
        return None
    for names, partition in case.groups.items():
        if not case.copies_there(partition):
            continue
        size = len(partition[0])
        fit = _fit(case, {g[0]: case.total(g) for g in partition}, case.subject.tolerance * size)
        if fit is None or not all(_near(c, 1) or _near(c, size) for c in fit.values()):
            continue
        own = [n for n, c in fit.items() if _near(c, 1)]
        if own and len(own) < len(fit):
            text = f"is each rank's own part of the term {own[0]!r} of the loss: not summed over {{axes}}"
            return Verdict("own part", text, tuple(names.split(" or ")), factor=1.0)
    return None


def _fit(case: _Case, values: Mapping[int, Tensor], tolerance: float) -> dict[str, float] | None:
    """How often each term of the loss counts in values, or None where they are no sum of terms."""
    terms = {n: t for n, t in case.subject.terms.items() if float(t.norm()) > tolerance}
    if len(terms) < 2:
        return None
    parts = [[take(t, case.part_of(r)).flatten() for t in terms.values()] for r in values]
    a, b = torch.cat([torch.stack(p, -1) for p in parts]), torch.cat([v.flatten() for v in values.values()])
    fit = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    scale = max(1.0, float(fit.abs().max()))
    if not float((a @ fit - b).norm()) <= tolerance * scale * len(values) ** 0.5:
        return None
    return dict(zip(terms, fit.tolist(), strict=True))


def equal_index(a: Index, b: Index) -> bool:
    """Whether two indices name the same part."""
    return all(
        (x is None) == (y is None) and (x is None or y is None or torch.equal(x, y)) for x, y in zip(a, b, strict=True)
    )


def _by_terms(case: _Case) -> Verdict | None:
    """A term of the loss counts more or less often than the others."""
    fit = _fit(case, case.values, case.subject.tolerance)
    wrong = [(n, c) for n, c in (fit or {}).items() if not _near(c, 1)]
    if not wrong:
        return None
    said = [(n, *name_factor(c, case.layout), c) for n, c in wrong]
    text = "; ".join(f"the term {n!r} of the loss counts {times}" for n, times, _, _ in said)
    return Verdict("term", text, tuple(a for _, _, axes, _ in said for a in axes), factor=wrong[0][1])


def _by_tokens(case: _Case) -> Verdict | None:
    """The batches of ranks are weighed otherwise: each rank's mean counts the same, whatever its number of tokens."""
    different: list[int] = []
    for rank, share in enumerate(case.subject.shares):
        if all(not torch.allclose(share, case.subject.shares[other], rtol=1e-9) for other in different):
            different.append(rank)
    if len(different) < 2:
        return None
    shares = [case.subject.shares[r].flatten() for r in different]
    right = _weights_of([case.subject.whole.flatten()], [shares], case.subject.tolerance)
    parts = [[take(case.subject.shares[r], case.part_of(q)).flatten() for r in different] for q in case.values]
    fit = _weights_of([v.flatten() for v in case.values.values()], parts, case.subject.tolerance)
    if fit is None:
        return None
    if right is None:
        text = "is made of what each rank's batch gives alone, and that does not add up to what all of them give"
        return Verdict("batches", text)
    if any(abs(r) < 1e-3 for r in right):
        return None
    said = ", ".join(f"{f / r:.4g}" for f, r in zip(fit, right, strict=True))
    ranks = _list(different)
    return Verdict("tokens", f"weighs the tokens of ranks {ranks} by {said} of what they should count: means of ranks")


def _weights_of(values: Sequence[Tensor], shares: Sequence[Sequence[Tensor]], tolerance: float) -> list[float] | None:
    """How often each share counts in values, or None where they are no sum of shares."""
    a, b = torch.cat([torch.stack(list(s), -1) for s in shares]), torch.cat(list(values))
    fit = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    scale = max(1.0, float(fit.abs().max())) * len(values)
    return fit.tolist() if float((a @ fit - b).norm()) <= tolerance * scale else None


def _wrong_group(case: _Case) -> Verdict | None:
    """Ranks with different parts added them up, as if they were copies; and those with copies did not."""
    copies = {n: p for n, p in case.groups.items() if case.copies_there(p)}
    for missing, apart in {"": [[r] for r in case.values], **copies}.items():
        summed = {r: case.total(g) for g in apart for r in g}
        for names, partition in case.groups.items():
            if not case.complete(partition) or case.copies(partition):
                continue
            if any(len({tuple(case.values[r].shape) for r in g}) > 1 for g in partition):
                continue
            mixed = [torch.stack([case.expected[q] for q in g]).sum(0) for g in partition]
            pairs = [(summed[r], mix) for g, mix in zip(partition, mixed, strict=True) for r in g]
            size = len(partition[0])
            c = _common_ratio(pairs, case.subject.tolerance * size * len(apart[0]))
            if c is None:
                continue
            how = "averaged" if _near(c, 1 / size) else "summed"
            instead = f", and not over {missing}" if missing else ""
            text = f"is {how} over {{axes}}, whose ranks hold different parts of it{instead}"
            return Verdict("wrong group", text, tuple(names.split(" or ")), factor=c)
    return None


def _differing_replicas(case: _Case) -> Verdict | None:
    for names, partition in case.groups.items():
        if not case.copies_there(partition):
            continue
        apart = [float((case.values[r] - case.values[g[0]]).norm()) for g in partition for r in g]
        if max(apart) > case.subject.tolerance:
            return Verdict("replicas differ", "differs between the ranks of {axes}", tuple(names.split(" or ")))
    return None


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
