"""Compare what the ranks of a layout saw with what the one process saw: a list of findings."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from moesaic.testing import layers
from moesaic.testing.diagnose import Subject, Verdict
from moesaic.testing.layout import Layout
from moesaic.testing.parameters import initial, places_of, subjects
from moesaic.testing.place import everything, find
from moesaic.testing.record import Check, Index, Run
from moesaic.testing.reference import Reference
from moesaic.testing.report import Finding, LayoutReport, merged
from moesaic.testing.scene import Scene, times_noise


def compare(
    check: Check,
    layout: Layout,
    reference: Reference,
    runs: list[Run],
    shares: Sequence[Mapping[str, Tensor | None]] = (),
) -> LayoutReport:
    """Compare everything in the order in which faults cause each other; what follows from a fault is left out."""
    scene = Scene(check, layout, reference, runs, _groups(layout, runs), shares)
    scene.places = places_of(scene)
    found = initial(scene) or _dropouts(scene)
    for number in range(check.steps):
        found = found or _step(scene, number)
    found = found or [*_buffers(scene), *_weights(scene)]
    return LayoutReport(layout, found, scene.notes, compared=scene.compared, largest=scene.largest)


def unsteady(reference: Reference, runs: list[Run], again: list[Run]) -> list[str]:
    """What differs between two runs of the same ranks by more than rounding."""
    found = set()
    for one, two in zip(runs, again, strict=True):
        for name, first in one.steps[0].grads.items():
            second, exact = two.steps[0].grads[name], reference.exact.steps[0].grads.get(name)
            if first is None or second is None or exact is None:
                continue
            tolerance = reference.tolerance(lambda run, name=name: run.steps[0].grads[name])
            # The ranks' values may be wrong by any factor, and what is rounded of them grows with it.
            expected = float(exact.norm())
            factor = max(1.0, float(first.double().norm()) / expected) if expected else 1.0
            if float((first.double() - second.double()).norm()) > factor * tolerance:
                found.add(f"gradient of {name}")
    return sorted(found)


def _groups(layout: Layout, runs: list[Run]) -> dict[str, list[list[int]]]:
    """The ranks that the axes of the layout join, and those of the meshes that the ranks made."""
    groups = layout.groups()
    known = [sorted(map(sorted, g)) for g in groups.values()]
    for name in {n for run in runs for n in run.meshes}:
        joined = sorted({tuple(sorted(g)) for run in runs for g in run.meshes.get(name, [])})
        partition = [list(g) for g in joined]
        whole = sorted(r for g in partition for r in g) == list(range(layout.world))
        if whole and partition not in known and len(partition[0]) > 1:
            groups.setdefault(name, partition)
    return dict(sorted(groups.items(), key=lambda item: len(item[1][0])))


def _dropouts(scene: Scene) -> list[Finding]:
    if any(run.dropouts for run in (scene.reference.exact, *scene.runs)):
        scene.notes.append("dropout was turned off for the comparison; its masks were compared by themselves")
    for names, partition in scene.groups.items():
        for group in partition:
            for calls in zip(*(scene.runs[r].dropouts for r in group), strict=False):
                masks = {mask for _, mask in calls}
                if len({entered for entered, _ in calls}) == 1 and len(masks) > 1:
                    text = "is another on ranks that hold the same activations, those of {axes}"
                    return [
                        Finding("dropout", "the mask of dropout", text, tuple(names.split(" or ")), 0.0, (), (2.0,))
                    ]
    return []


def _step(scene: Scene, number: int) -> list[Finding]:
    found = []
    when = f" in step {number + 1}" if number else ""
    exact = scene.reference.exact.steps[number]
    flips = sum(run.flips for run in scene.runs)
    if flips and not number:
        scene.notes.append(
            f"routing: {flips} choice{'s' * (flips > 1)} of topk on these ranks fell between scores that are equal up "
            "to rounding; the choice of the one process was taken"
        )
    output = layers.output_subject(scene, number)
    if output is not None:
        verdict = scene.judge(output)
        if verdict is not None:
            found.append(layers.finding(scene, verdict, output, number))
    tolerances = {n: scene.tolerance(lambda run, n=n: run.steps[number].grads[n]) for n in exact.grads}
    of_rank = [run.steps[number].grads for run in scene.runs]
    order = {name: i for i, name in enumerate(exact.grads)}
    wrong = []
    shares = () if number else scene.shares
    for name, subject in subjects(scene, exact.grads, of_rank, tolerances, exact.by_term, shares):
        verdict = scene.judge(subject)
        if verdict is not None:
            wrong.append(_gradient_finding(name, verdict, subject.tolerance, when, order[name]))
    if found:
        # They follow from the output; what has a name by itself may be a fault of its own.
        named = [f for f in wrong if f.kind not in ("unrelated", "replicas differ")]
        if len(wrong) > len(named):
            scene.notes.append(f"gradients of {len(wrong) - len(named)} parameters are wrong as the output is")
        wrong = named
    found += merged(wrong, len(exact.grads))
    if any(f.kind in ("unrelated", "replicas differ") for f in wrong):
        found += layers.backward_findings(scene, number)
    if not found:
        found += _loss(scene, number)
        found += _input_gradients(scene, number)
        found += _norm(scene, number, when)
    return sorted(found, key=lambda f: f.rank_order)


def _gradient_finding(name: str, verdict: Verdict, tolerance: float, when: str, order: int) -> Finding:
    # What is nearest to the loss is wrong first; what has a name comes before what follows from it.
    unexplained = verdict.kind in ("unrelated", "replicas differ")
    return Finding(
        verdict.kind,
        f"gradient of {name}{when}",
        verdict.text,
        verdict.axes,
        times_noise(verdict.error, tolerance),
        (name,),
        (4.0 + 2 * unexplained, float(-order)),
    )


def _loss(scene: Scene, number: int) -> list[Finding]:
    """A rank may report the whole loss, its share, or its mean: the report says which; anything else is a fault."""
    exact = float(scene.reference.exact.steps[number].loss)
    tolerance = scene.tolerance(lambda run: run.steps[number].loss) * len(scene.runs)
    losses = [float(run.steps[number].loss) for run in scene.runs]
    scene.compared += 1
    # Ranks that share their tokens report the same; one of them speaks for all.
    readings = [("", losses)]
    for names, partition in scene.groups.items():
        if all(abs(losses[r] - losses[g[0]]) <= tolerance for g in partition for r in g):
            readings.append((f"ranks of {names} report the same loss, ", [losses[g[0]] for g in partition]))
    for head, different in reversed(readings):
        for text, value in (
            ("and all of them their share", 1),
            ("and all of them the mean over their tokens", len(different)),
        ):
            if abs(sum(different) / value - exact) <= tolerance:
                if not number:
                    said = text if len(different) > 1 else "that of the one process"
                    scene.notes.append(f"loss: {head}{said}".replace(": and all of them", ": the ranks report"))
                return []
    each = ", ".join(f"{x:.6g}" for x in losses)
    text = f"is {each} on the ranks, and {exact:.6g} in the one process: neither their sum nor a mean"
    error = abs(sum(losses) - exact)
    return [Finding("loss", "loss", text, (), times_noise(error, tolerance), (), (6.0,))]


def _input_gradients(scene: Scene, number: int) -> list[Finding]:
    exact = scene.reference.exact.steps[number]
    found = []
    for name, grad in exact.input_grads.items():
        if grad is None or any(name not in run.steps[number].input_grads for run in scene.runs):
            continue
        parts: list[tuple[Tensor, Index] | None] = []
        for run in scene.runs:
            index = find(run.steps[number].inputs[name], scene.reference.plain.steps[number].inputs[name])
            value = run.steps[number].input_grads[name]
            parts.append(None if value is None or index is None else (value, index))
        tolerance = scene.tolerance(lambda run, name=name: run.steps[number].input_grads[name])
        subject = Subject(grad.double(), parts, tolerance, {}, [p is not None for p in parts])
        verdict = scene.judge(subject)
        # A factor, or a share of the sum, is how the loss is cut between the ranks: gradients of weights are right.
        if verdict is not None and verdict.kind not in ("factor", "own part", "own mean", "missing"):
            found.append(
                Finding(
                    "input gradient",
                    f"gradient of the input {name!r}",
                    verdict.text,
                    verdict.axes,
                    times_noise(verdict.error, tolerance),
                    (name,),
                    (7.0,),
                )
            )
    return found


def _norm(scene: Scene, number: int, when: str) -> list[Finding]:
    exact = scene.reference.exact.steps[number].norm
    norms = [n for run in scene.runs if (n := run.steps[number].norm) is not None]
    if exact is None or len(norms) < len(scene.runs):
        return []
    scene.compared += 1
    tolerance = scene.tolerance(lambda run: run.steps[number].norm)
    values = [float(n) for n in norms]
    if all(abs(v - float(exact)) <= tolerance for v in values):
        return []
    each = ", ".join(f"{v:.6g}" for v in values)
    text = f"is {each} on the ranks, and {float(exact):.6g} in the one process"
    if len({f"{v:.6g}" for v in values}) > 1:
        text += ": each rank clips by the norm of what it holds"
    else:
        text += ": some gradients are left out of it, or counted more than once"
    error = max(abs(v - float(exact)) for v in values)
    return [Finding("norm", f"gradient norm{when}", text, (), times_noise(error, tolerance), (), (8.0,))]


def _buffers(scene: Scene) -> list[Finding]:
    found = []
    for name, whole in scene.reference.exact.buffers.items():
        values = [run.buffers.get(name) for run in scene.runs]
        if any(v is None or v.shape != whole.shape for v in values):
            scene.notes.append(f"buffer {name} has other shapes on the ranks, and was not compared")
            continue
        parts: list[tuple[Tensor, Index] | None] = [(v, everything(whole)) for v in values if v is not None]
        tolerance = scene.tolerance(lambda run, name=name: run.buffers.get(name))
        subject = Subject(whole.double(), parts, tolerance, {}, [True] * len(parts))
        verdict = scene.judge(subject)
        if verdict is None:
            continue
        if verdict.kind == "own part":
            scene.notes.append(f"buffer {name} is each rank's own; its sum is that of the one process")
            continue
        error = times_noise(verdict.error, tolerance)
        found.append(Finding("buffer", f"buffer {name}", verdict.text, verdict.axes, error, (name,), (9.0,)))
    return found


def _weights(scene: Scene) -> list[Finding]:
    whole = scene.reference.exact.final
    tolerances = {n: scene.tolerance(lambda run, n=n: run.final[n]) for n in whole}
    wrong = []
    for name, subject in subjects(scene, whole, [run.final for run in scene.runs], tolerances):
        verdict = scene.judge(subject)
        if verdict is not None:
            text = "differs from that of the one process" if verdict.kind != "replicas differ" else verdict.text
            times = times_noise(verdict.error, subject.tolerance)
            axes = verdict.axes if verdict.kind == "replicas differ" else ()
            wrong.append(Finding("weights", f"weight {name} after the last step", text, axes, times, (name,), (9.0,)))
    return merged(wrong, len(whole))
