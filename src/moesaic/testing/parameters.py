"""Parameters of ranks: of which parameter of the one process each is, which part, and whether it began as it should."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moesaic.testing.diagnose import Subject
from moesaic.testing.errors import CheckError
from moesaic.testing.place import everything, find, of_slices, take
from moesaic.testing.record import Index
from moesaic.testing.report import Finding, merged
from moesaic.testing.scene import Places, Scene


def places_of(scene: Scene) -> Places:
    """Where each rank's parameters lie, by what the user says or by their values.

    Raises:
        CheckError: a parameter is nowhere in the one process.
    """
    places: Places = []
    for rank, run in enumerate(scene.runs):
        found: dict[str, tuple[str, Index]] = {}
        for name, mine in run.initial.items():
            found[name] = _said(scene, name, rank, mine) or _found(scene, name, rank, mine)
        places.append(found)
    return places


def _said(scene: Scene, name: str, rank: int, mine: Tensor) -> tuple[str, Index] | None:
    """What the user says."""
    given = scene.check.where(name, rank, scene.layout) if scene.check.where else None
    if given is None:
        return None
    whole = scene.reference.plain.initial.get(given[0])
    if whole is None:
        raise CheckError(f"where: it gave {given[0]!r} for {name}, and the one process has no such parameter")
    index = of_slices(whole, given[1])
    if take(whole, index).shape != mine.shape:
        raise CheckError(
            f"where: it gave {given} for {name}, which is {list(take(whole, index).shape)} in the one process and "
            f"{list(mine.shape)} on rank {rank}"
        )
    return given[0], index


def _found(scene: Scene, name: str, rank: int, mine: Tensor) -> tuple[str, Index]:
    """The parameter of the same name, or one with the same values: a rank's experts may have other experts' names."""
    whole = scene.reference.plain.initial
    there = whole.get(name)
    if there is not None and there.shape == mine.shape and torch.equal(there, mine):
        return name, everything(there)
    for other, values in whole.items():
        if other != name and values.shape == mine.shape and _same(values, mine):
            return other, everything(values)
    index = None if there is None else find(mine, there)
    if index is None:
        is_there = "" if there is None else f", where it is {list(there.shape)}"
        raise CheckError(
            f"parameter {name} {list(mine.shape)} of rank {rank} is no part of one of the one process{is_there}; give "
            "where=, a function of the name, the rank and the layout that says which part of which it is"
        )
    return name, index


def _same(a: Tensor, b: Tensor) -> bool:
    # A constant, such as a norm's ones, says nothing of whose it is.
    return torch.equal(a, b) and a.numel() > 1 and bool((a != a.flatten()[0]).any())


def subjects(
    scene: Scene,
    values: Mapping[str, Tensor | None],
    of_rank: Sequence[Mapping[str, Tensor | None]],
    tolerance: Mapping[str, float],
    terms: Mapping[str, Mapping[str, Tensor | None]] | None = None,
    shares: Sequence[Mapping[str, Tensor | None]] = (),
) -> Iterator[tuple[str, Subject]]:
    """Each value of the one process beside what the ranks have of it; several times where a rank has several parts."""
    for name, value in values.items():
        here = [
            [(own, index) for own, (n, index) in places.items() if n == name and own in mine]
            for places, mine in zip(scene.places, of_rank, strict=True)
        ]
        whole = torch.zeros_like(scene.reference.plain.initial[name]) if value is None else value
        of_terms = {n: g.double() for n, t in (terms or {}).items() if (g := t.get(name)) is not None}
        of_shares = [g.double() for s in shares if (g := s.get(name)) is not None]
        for number in range(max(1, *map(len, here))):
            parts: list[tuple[Tensor, Index] | None] = []
            for mine, own in zip(of_rank, here, strict=True):
                part = mine[own[number][0]] if number < len(own) else None
                parts.append(None if part is None else (part, own[number][1]))
            # A parameter that no rank has is missing everywhere.
            has_part = [number < len(own) or not any(here) for own in here]
            same = of_shares if len(of_shares) == len(shares) else []
            yield name, Subject(whole.double(), parts, tolerance[name], of_terms, has_part, same)


def initial(scene: Scene) -> list[Finding]:
    """Weights that are not those of the one process before the first step, and parts that no rank has."""
    whole = scene.reference.plain.initial
    found, lost = [], []
    covered = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in whole.items()}
    exact = dict.fromkeys(whole, 0.0)
    for name, subject in subjects(scene, whole, [run.initial for run in scene.runs], exact):
        wrong = []
        for rank, part in enumerate(subject.parts):
            if part is None:
                continue
            _cover(covered[name], part[1])
            if not torch.equal(part[0].double(), take(subject.whole, part[1])):
                wrong.append(rank)
        scene.compared += 1
        if wrong:
            axes = _axes_between(subject, scene.groups)
            text = f"is not what build() gives in the one process, on rank {', '.join(map(str, wrong))}"
            text += "; it differs between the ranks of {axes}" if axes else ""
            found.append(Finding("initial", f"weight {name} before the first step", text, axes, 0.0, (name,), (1.0,)))
    for name, mask in covered.items():
        if not bool(mask.all()) and not found:
            text = f"{int((~mask).sum())} of its {mask.numel()} numbers are on no rank"
            lost.append(Finding("lost", f"weight {name}", text, (), 0.0, (name,), (1.0,)))
    return merged(found or lost, len(whole))


def _cover(mask: Tensor, index: Index) -> None:
    grid = [torch.arange(n) if i is None else i for n, i in zip(mask.shape, index, strict=True)]
    if grid:
        mask[torch.meshgrid(*grid, indexing="ij")] = True
    else:
        mask.fill_(True)


def _axes_between(subject: Subject, groups: Mapping[str, list[list[int]]]) -> tuple[str, ...]:
    for names, partition in groups.items():
        for group in partition:
            values = [p[0] for r in group if (p := subject.parts[r]) is not None]
            if len(values) == len(group) and any(
                v.shape == values[0].shape and not torch.equal(v, values[0]) for v in values
            ):
                return tuple(names.split(" or "))
    return ()
