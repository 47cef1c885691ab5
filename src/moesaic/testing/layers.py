"""Where a wrong output comes from: the first layer, in order of the forward pass, whose output is wrong."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.testing.diagnose import Subject, Verdict, equal_index, judge, name_factor
from moesaic.testing.layout import Layout
from moesaic.testing.place import find, take
from moesaic.testing.record import Index, Run
from moesaic.testing.report import Finding
from moesaic.testing.scene import Scene, times_noise


class _Rows:
    """Which leading indices a rank's activations have, learned from layers that are right."""

    def __init__(self, scene: Scene, number: int):
        self._known: list[dict[tuple[int, ...], Index]] = [{} for _ in scene.runs]
        # Which rows a rank has, by how many: where its inputs are rows of those of the one process.
        self._rows: list[dict[tuple[int, int], Tensor]] = [{} for _ in scene.runs]
        whole = scene.reference.plain.steps[number].inputs
        for run, rows in zip(scene.runs, self._rows, strict=True):
            for name, mine in run.steps[number].inputs.items():
                if name in whole and mine.shape[1:] == whole[name].shape[1:] and mine.ndim:
                    index = find(mine, whole[name])
                    if index and index[0] is not None and torch.equal(take(whole[name], index), mine):
                        rows.setdefault((len(mine), len(whole[name])), index[0])

    def place(self, rank: int, part: Tensor, whole: Tensor, tolerance: float) -> Index | None:
        if part.ndim != whole.ndim or part.ndim == 0:
            return None if part.ndim != whole.ndim else ()
        key = (*part.shape[:-1], -1, *whole.shape[:-1])
        lead = self._known[rank].get(key)
        if lead is not None:
            inner = find(part, take(whole, (*lead, None)))
            return None if inner is None else (*lead, inner[-1])
        rows = self._rows[rank].get((len(part), len(whole)))
        if rows is None:
            index = find(part, whole)
        else:
            inner = find(part, whole.index_select(0, rows))
            index = None if inner is None else (rows, *inner[1:])
        if index is not None and float((part.double() - take(whole, index)).norm()) <= tolerance:
            self._known[rank][key] = index[:-1]
        return index


def output_subject(scene: Scene, number: int) -> Subject | None:
    """The model's output of a step, or None where it has none to compare."""
    whole = scene.reference.exact.steps[number].output
    if whole is None or all(run.steps[number].output is None for run in scene.runs):
        return None
    tolerance = scene.tolerance(lambda run: run.steps[number].output)
    rows = _Rows(scene, number)
    return _subject(whole, [run.steps[number].output for run in scene.runs], tolerance, rows)


def _subject(whole: Tensor, values: list[Tensor | None], tolerance: float, rows: _Rows) -> Subject | None:
    whole = whole.double()
    parts: list[tuple[Tensor, Index] | None] = []
    for rank, value in enumerate(values):
        index = None if value is None else rows.place(rank, value, whole, tolerance)
        parts.append(None if value is None or index is None else (value, index))
    if all(p is None for p in parts):
        return None
    return Subject(whole, parts, tolerance, {}, [p is not None for p in parts])


def finding(
    scene: Scene,
    verdict: Verdict,
    output: Subject,
    number: int,
) -> Finding:
    """The finding for an output that is wrong, down to a layer where the layers were recorded."""
    when = f" in step {number + 1}" if number else ""
    found = _first_wrong(scene) if not number and all(run.layers for run in scene.runs) else None
    if found is None:
        kind = "layer own part" if verdict.kind == "own part" else "layer"
        error = times_noise(verdict.error, output.tolerance)
        return Finding(kind, f"output of the model{when}", verdict.text, verdict.axes, error, (), (3.0,))
    name, verdict, tolerance = found
    kind = {"own part": "layer own part", "bias": "bias", "child": "child", "factor": "child"}.get(
        verdict.kind, "layer"
    )
    text = f"{verdict.text}; it is the first layer whose output is wrong"
    error = times_noise(verdict.error, tolerance)
    return Finding(kind, f"output of {name}{when}", text, verdict.axes, error, (name,), (3.0,))


def backward_findings(scene: Scene, number: int) -> list[Finding]:
    """The first module, in order of the backward pass, whose gradient for its input is wrong; outputs are right."""
    if number or not all(run.entering for run in scene.runs):
        return []
    verdicts, subjects = _judged(scene, lambda run: run.entering)
    # How the loss is cut between ranks is a factor of all these gradients: that of the last module.
    last = next(iter(verdicts.values()), None)
    if last is not None and last.kind == "factor" and last.factor:
        scale = last.factor
        subjects = {
            n: replace(s, parts=[None if p is None else (p[0] / scale, p[1]) for p in s.parts])
            for n, s in subjects.items()
        }
        verdicts = {n: judge(s, scene.layout, scene.groups) for n, s in subjects.items()}
    inside, found = "", None
    while (name := _next(verdicts, inside)) is not None:
        found, inside = name, name
        # Inside a module a rank may hold parts; what leaves the outermost wrong one is what counts.
        if verdicts[name].kind not in ("unrelated", "replicas differ"):  # type: ignore[union-attr]
            break
    if found is None:
        return []
    verdict = verdicts[found]
    assert verdict is not None
    error = times_noise(verdict.error, subjects[found].tolerance)
    kind = verdict.kind if verdict.kind in ("own part", "factor", "own mean") else "input gradient"
    text = f"{verdict.text}; it is the first that the backward pass gets wrong"
    return [Finding(kind, f"gradient for the input of {found}", text, verdict.axes, error, (found,), (5.0,))]


def _judged(
    scene: Scene, get: Callable[[Run], Mapping[str, Tensor]]
) -> tuple[dict[str, Verdict | None], dict[str, Subject]]:
    rows = _Rows(scene, 0)
    verdicts: dict[str, Verdict | None] = {}
    subjects: dict[str, Subject] = {}
    # Rows are learned from outputs, which come out right more often.
    for name, whole in scene.reference.exact.layers.items():
        tolerance = scene.tolerance(lambda run, name=name: run.layers.get(name))
        _subject(whole, [run.layers.get(name) for run in scene.runs], tolerance, rows)
    for name, whole in get(scene.reference.exact).items():
        tolerance = scene.tolerance(lambda run, name=name: get(run).get(name))
        subject = _subject(whole, [get(run).get(name) for run in scene.runs], tolerance, rows)
        if subject is not None:
            subjects[name] = subject
            verdicts[name] = judge(subject, scene.layout, scene.groups)
    return verdicts, subjects


def _first_wrong(scene: Scene) -> tuple[str, Verdict, float] | None:
    verdicts, subjects = _judged(scene, lambda run: run.layers)
    inside, found = "", None
    while (name := _next(verdicts, inside)) is not None:
        verdict, subject = verdicts[name], subjects[name]
        assert verdict is not None
        explained = None
        for explain in (_added_bias, _added_child, _own_part_but_one):
            explained = explained or explain(name, subject, scene)
        found = name, explained or verdict, subject.tolerance
        if explained:
            break
        inside = name
    return found


def _next(verdicts: Mapping[str, Verdict | None], inside: str) -> str | None:
    """The module right inside one that is the likeliest cause: the first wrong one after the last that is right.

    Where wrong ones only come before right ones, as modules side by side do, it is the first of them; last come those
    whose ranks hold parts of a sum, which the module around them may be about to add up.
    """
    prefix = f"{inside}." if inside else ""
    here = [n for n in verdicts if n.startswith(prefix) and n != inside]
    # Containers such as lists of layers have no output of their own.
    direct = [n for n in here if not any(n.startswith(f"{other}.") for other in here)]
    after_right = max((i for i, n in enumerate(direct) if verdicts[n] is None), default=-1)
    wrong = {n: v for n in direct if (v := verdicts[n]) is not None}
    others = sorted(wrong, key=lambda n: wrong[n].kind == "own part")
    return next((n for n in [*direct[after_right + 1 :], *others]), None)


def _biases(name: str, subject: Subject, scene: Scene) -> dict[str, Tensor]:
    return {
        n: t.double().expand_as(subject.whole)
        for n, t in scene.reference.exact.initial.items()
        if t.ndim == 1 and n.startswith(f"{name}.") and len(t) == subject.whole.shape[-1]
    }


def _children(name: str, subject: Subject, scene: Scene) -> dict[str, Tensor]:
    """Outputs of the modules inside one, the outermost first."""
    inside = {n: t for n, t in scene.reference.exact.layers.items() if n.startswith(f"{name}.")}
    return {
        n: inside[n].double().reshape(subject.whole.shape)
        for n in sorted(inside, key=lambda n: n.count("."))
        if inside[n].numel() == subject.whole.numel() and inside[n].shape[-1] == subject.whole.shape[-1]
    }


def _added_bias(name: str, subject: Subject, scene: Scene) -> Verdict | None:
    """The output is wrong by a multiple of a bias in every row."""
    return _multiple(subject, scene.layout, "bias", _biases(name, subject, scene))


def _added_child(name: str, subject: Subject, scene: Scene) -> Verdict | None:
    """The output is wrong by a multiple of the output of a module inside."""
    return _multiple(subject, scene.layout, "child", _children(name, subject, scene))


def _own_part_but_one(name: str, subject: Subject, scene: Scene) -> Verdict | None:
    """The output is each rank's own part, but for a bias or a module that every rank has whole."""
    whole_on_each = _biases(name, subject, scene) | _children(name, subject, scene)
    for names, partition in scene.groups.items():
        members = [[p for r in g if (p := subject.parts[r]) is not None] for g in partition]
        size = len(partition[0])
        if any(len(g) < size or not all(equal_index(i, g[0][1]) for _, i in g) for g in members):
            continue
        for term, value in whole_on_each.items():
            errors = [
                float(
                    (torch.stack([v for v, _ in g]).sum(0) - take(subject.whole + (size - 1) * value, g[0][1])).norm()
                )
                for g in members
            ]
            if max(errors) <= 2 * size * subject.tolerance:
                text = f"is each rank's own part, with all of {term}: not summed over {{axes}}"
                error = max(float((v.double() - take(subject.whole, i)).norm()) for g in members for v, i in g)
                return Verdict("own part", text, tuple(names.split(" or ")), error, 1.0)
    return None


def _multiple(subject: Subject, layout: Layout, kind: str, candidates: Mapping[str, Tensor]) -> Verdict | None:
    parts = [p for p in subject.parts if p is not None]
    error = max(float((v.double() - take(subject.whole, i)).norm()) for v, i in parts)
    for name, value in candidates.items():
        extra = torch.cat([(v.double() - take(subject.whole, i)).flatten() for v, i in parts])
        term = torch.cat([take(value, i).flatten() for _, i in parts])
        size = float(term.square().sum())
        if size == 0:
            continue
        k = float((extra * term).sum()) / size
        tolerance = 2 * subject.tolerance * len(parts) ** 0.5 * max(1.0, abs(k))
        if float((extra - k * term).norm()) <= tolerance and abs(k) * size**0.5 > tolerance:
            said, axes = name_factor(k + 1, layout)
            if axes:
                return Verdict(kind, f"has {name} in it {said}", axes, error, k + 1)
    return None
