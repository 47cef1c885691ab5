"""``prove``: is a sharding rule right, and is it complete? Tried on simulated ranks, in one process."""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.sharding.decide import RULES, overload_of
from moesaic.sharding.formula import operators_of_gradient
from moesaic.sharding.proof.candidates import on_one_axis
from moesaic.sharding.proof.deciders import decider_of
from moesaic.sharding.proof.examples import (
    Example,
    check_inputs,
    check_numbers,
    check_op,
    first_line,
    line_for,
    silent_results,
    variants,
    with_keywords,
    with_line,
)
from moesaic.sharding.proof.fakes import check_fake
from moesaic.sharding.proof.gradients import judge_gradients, one_process
from moesaic.sharding.proof.growing import grown
from moesaic.sharding.proof.placing import same
from moesaic.sharding.proof.precision import exact, precise, same_dtypes
from moesaic.sharding.proof.report import Report, certainty_of
from moesaic.sharding.proof.search import Search, on_each_axis
from moesaic.sharding.proof.trial import EMPTY, Inputs, Trial
from moesaic.sharding.proof.untried import made_up, note_untried
from moesaic.sharding.proof.values import beyond_all_sizes, constants, described, skewed
from moesaic.sharding.simulated import simulated_ranks

# Names no real mesh has: DTensor and its operators keep decisions by meshes that compare equal.
_AXES = ("proof a", "proof b", "proof c")
_MOST_COMBINATIONS = 128

# An example, and what it comes to in one process.
Run = tuple[Example, tuple[Tensor, ...]]


def prove(
    op: Any,
    *example_inputs: Any,
    also: Sequence[tuple[Any, ...]] = (),
    axes: Sequence[int] = (2, 3, 4),
    meshes: Sequence[tuple[int, ...]] = ((2, 2), (2, 3)),
    backward: bool = True,
    make_up: bool = True,
    on_progress: Callable[[str], None] | None = None,
    **keywords: Any,
) -> Report:
    """Try every placement of every input and result of an operator, and hold its sharding rule against what is right.

    For every mesh, and for the example and narrower ones made of it (sizes that divide by the mesh, that do not, and
    that are smaller than it), the inputs are split by the definition of each placement: ``Replicate``, ``Shard`` of
    each dim, ``Partial`` sum, avg, max and min, these into unrelated terms. The operator runs on the part of every
    rank. What results is put together by each placement and compared with the run on the whole. What the rule admits
    has to be right, and so have the gradients that autograd brings through real DTensors. What is right in all cases,
    or in all cases in which sizes divide evenly, the rule should admit.

    It is a search for counterexamples, and looks at the sizes it is given: sizes of 12 and more let every mesh divide
    them. Integer tensors are taken as they are, so give examples of what they can be in ``also``. The first must not be
    constant.

    Args:
        op: a custom_op, an ``OpOverload`` or an ``OpOverloadPacket``. One without a rule of ours is held to what
            DTensor's own propagation decides.
        example_inputs: arguments in the order of the schema: plain tensors, random, as large as you like; whatever is
            not a tensor is passed on as it is. Floating tensors become float64 where the operator takes that, else
            float32. If it takes half types only, or rounds to them, small whole numbers are drawn in their place, which
            are exact.
        also: further examples, each a tuple of arguments in the order of the schema, keyword-only ones last.
        axes: sizes of meshes of one axis.
        meshes: shapes of larger meshes, of at most three axes.
        backward: whether to compare gradients. That needs a process group of its own (nothing is communicated).
        make_up: whether to try calls that no example has, as far as they can be made up: without an optional tensor,
            with other flags, with most of an integer tensor's numbers the same.
        on_progress: is told what is being looked at.
        keywords: arguments of the operator by name, of all examples that do not give them.

    Returns:
        a :class:`Report`; ``print`` shows it as a table.

    Raises:
        TypeError: ``op`` is no operator, or has no argument of a name in ``keywords``.
        ValueError: inputs that could not tell a right rule from a wrong one, such as a constant tensor, or that no line
            of the rule fits; an operator that mutates its arguments, is random, or has no fake kernel; or, with
            ``backward``, a process group that is initialised.

    Example:
        >>> report = moesaic.prove(my_mm, torch.randn(13, 12), torch.randn(12, 14))
        >>> assert report.ok, report
    """
    op = overload_of(op)
    check_op(op)
    if backward and dist.is_initialized():
        raise ValueError(
            "prove() compares gradients on simulated ranks, and there is a process group already. Call it before "
            "init_process_group, in another process, or with backward=False"
        )
    meshes = [*((n,) for n in axes), *map(tuple, meshes)]
    if not axes or any(n < 2 for mesh in meshes for n in mesh):
        raise ValueError(f"axes, meshes: give at least one axis, and at least two ranks on each; got {meshes}")
    if most := [mesh for mesh in meshes if len(mesh) > len(_AXES)]:
        raise ValueError(f"meshes: at most three axes; got {', '.join('x'.join(map(str, mesh)) for mesh in most)}")
    report = Report(op._name, str(RULES.get(op, "")), tuple(meshes))
    with _one_thread(), _poisoned():
        given = [Example(op, with_keywords(op, args, keywords)) for args in (example_inputs, *also)]
        examples = [example for call in given for example in _examples(report, op, call.args)]
        check_numbers(examples[0])
        examples += _made_up(report, examples, given) if make_up else []
        report.values = described(examples)
        for text in beyond_all_sizes(examples) if op in RULES else ():
            report.note(text)
        _note_silent_results(report, examples)
        note_untried(report, examples)
        for of_form in _by_form(report, examples):
            _prove_form(report, of_form, backward, on_progress or (lambda text: None))
    return report


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: on small tensors several would spend more time waiting than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fill new memory with NaN: values from before could pass for results that the operator did not write."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _examples(report: Report, op: Any, args: tuple[Any, ...]) -> list[Example]:
    """The call as it is compared, and in the dtypes that it has: on whole numbers where it is sums and products."""
    check_inputs(op, args)
    given = Example(op, args)
    before = [t.clone() for t in given.tensors]
    try:
        results = given.run()
    except Exception as error:
        raise ValueError(f"{op._name} refuses the inputs: {error}") from error
    for name, t, was in zip(given.names, given.tensors, before, strict=True):
        if not same(t, was):
            raise ValueError(
                f"{op._name} changes {name}, and its schema does not say so; on ranks it would change copies"
            )
    check_fake(given, results)
    if not all(same(a, b) for a, b in zip(results, given.run(), strict=True)):
        raise ValueError(f"{op._name} gives different results for the same inputs, so nothing can be proved about it")
    example, note = precise(given)
    if note:
        report.note(note)
    on_whole_numbers = None if example.whole else exact(given)
    if on_whole_numbers is None:
        # A kernel for the dtype that was given may be another.
        as_given = [] if example.whole or same_dtypes(example, given) else [replace(given, brief=True)]
        return [with_line(e, RULES.get(op)) for e in (example, *as_given)]
    # Of other sizes, too, nearly all are compared exactly.
    return [
        with_line(replace(example, few_sizes=True, once=True), RULES.get(op)),
        with_line(on_whole_numbers, RULES.get(op)),
    ]


def _note_silent_results(report: Report, examples: Sequence[Example]) -> None:
    """Of each line of the rule, some example has to tell right from wrong."""
    for text in {example.line.text: None for example in examples if example.line}:
        of_line = [example for example in examples if example.line and example.line.text == text]
        report.untried += [f"{name}: nothing was proved about it" for name in silent_results(of_line)]


def _made_up(report: Report, examples: Sequence[Example], given: Sequence[Example]) -> list[Example]:
    """Examples with other flags, or without a tensor, where the rule admits them and the operator takes them."""
    found: list[Example] = []
    first = replace(examples[0], args=given[0].args)
    for what, args in [*made_up(given), *skewed(first), *grown(first)]:
        try:
            new = _examples(report, examples[0].op, args)
        except ValueError as error:
            report.refused.append(what)
            report.note(f"not tried with {what}: {first_line(error)}")
            continue
        # With the line and the tensors of an example it has the same placements: those that are right are looked at.
        known = {(e.line, tuple(e.positions)) for e in examples}
        brief = (new[0].line, tuple(new[0].positions)) in known
        found += [replace(e, few_sizes=True, brief=brief) for e in (new[-1:] if brief else new)]
    return found


def _by_form(report: Report, examples: Sequence[Example]) -> list[list[Run]]:
    """Examples with the placements of one kind: the same line of the rule, numbers of dims, and arguments given."""
    rule = RULES.get(examples[0].op)
    forms: dict[Any, list[Run]] = {}
    for example in examples:
        of_example = [example]
        if not example.brief:
            of_example = variants(example, report.meshes, [n for _, n in constants(example)])
        for variant in of_example:
            try:
                results = variant.run()
            except Exception as error:
                shapes = ", ".join(str(list(shape)) for shape in variant.shapes)
                report.note(f"not tried, as the operator refuses it: {shapes}: {first_line(error)}")
                continue
            if rule and line_for(variant, rule, [r.shape for r in results]) != example.line:
                continue  # of another form, of which there are other examples or a note
            text = example.line.text if example.line else ""
            check_fake(variant, results)
            form = (text, tuple(map(len, example.shapes)), tuple(example.positions))
            forms.setdefault(form, []).append((variant, results))
    return list(forms.values())


def _prove_form(report: Report, runs: Sequence[Run], backward: bool, tell: Callable[[str], None]) -> None:
    op, line = runs[0][0].op, runs[0][0].line
    search = Search(decider_of(op), line.text if line else "")
    # DTensor's own propagation takes ten milliseconds a call and more.
    most = _MOST_COMBINATIONS if op in RULES else _MOST_COMBINATIONS // 4
    choices: Sequence[Inputs] = ()
    for mesh in sorted(report.meshes, key=len):
        if len(mesh) == 1:
            choices, number = on_one_axis(Trial(*runs[0], mesh), RULES.get(op))
            if number > len(choices):
                what = "one factor each, all that differ from these in one tensor, and a sample of the others"
                report.note(f"one axis: {len(choices)} of {number} placements, {what}")
        else:
            choices, number = search.combinations(len(mesh), most)
            if number > most:
                report.note(f"{len(mesh)} axes: a sample, {most} of {number} combinations of what one axis has")
        for n, (example, results) in enumerate(runs):
            if (example.brief or (example.narrowed and example.once)) and mesh != report.meshes[0]:
                continue
            tell(f"placements on {' x '.join(map(str, mesh))} ranks, example {n + 1} of {len(runs)}")
            trial = Trial(example, results, mesh)
            search.judge(trial, choices)
            search.trials.append(trial)
            report.num_cases += 1
        if search.private:
            _prove_private(report, search, mesh)
    if backward:
        for mesh in report.meshes:
            tell(f"gradients on {' x '.join(map(str, mesh))} ranks")
            _prove_gradients(report, search, mesh)
    report.certainty.append(certainty_of(line, search.trials))
    report.admitted += search.records("admitted")
    report.wrong += search.records("wrong")
    report.missing += search.missing()
    report.hidden += search.records("hidden")
    report.stuck += search.records("stuck")


def _prove_private(report: Report, search: Search, mesh: tuple[int, ...]) -> None:
    """Run through DTensor what only its own dispatch of an operator can: it cuts what no placement of ours does."""
    if dist.is_initialized():
        report.note("placements of torch's own kinds were not tried: there is a process group already")
        return
    with simulated_ranks(*mesh, names=_AXES) as ranks:
        refused = list(search.judge_private(ranks))
    if refused:
        report.note(f"not tried with placements of torch's own kinds: {refused[0]}; {len(refused) - 1} more")
    report.note("placements of torch's own kinds were run through DTensor, without gradients")


def _prove_gradients(report: Report, search: Search, mesh: tuple[int, ...]) -> None:
    """Check the gradients of all that is admitted and right, in a case of each kind; of many, a sample."""
    admitted, most = search.right_of_each_kind(mesh), _MOST_COMBINATIONS // 3
    if len(set(mesh)) < len(mesh):
        # On axes of one size a choice turned round is the same with ranks renumbered: forward both were looked at.
        admitted = list(
            {(id(trial), *sorted(map(str, on_each_axis(i)))): (trial, i, o) for trial, i, o in admitted}.values()
        )
    if len(mesh) > 1 and len(admitted) > most:
        admitted = random.Random(0).sample(admitted, most)
    trials = list({id(trial): trial for trial, _, _ in admitted}.values())
    alone = {id(trial): one_process(trial) for trial in trials}
    of_gradient = {id(trial): _gradient_of(trial) for trial in trials}
    for error in alone.values():
        if isinstance(error, str):
            report.note(f"no gradient: {error}")
    with simulated_ranks(*mesh, names=_AXES) as ranks:
        for trial, inputs, outputs in admitted:
            expected = alone[id(trial)]
            if isinstance(expected, str):
                continue
            verdict = judge_gradients(ranks, trial, inputs, outputs, expected)
            if verdict.error:
                search.note("wrong", trial, inputs, outputs, verdict.error)
            elif verdict.refused:
                search.note("stuck", trial, inputs, outputs, verdict.refused)
            elif verdict.moved:
                may_move = _may_move(trial, inputs, of_gradient[id(trial)])
                search.note("hidden" if may_move else "wrong", trial, inputs, outputs, verdict.moved)


def _gradient_of(trial: Trial) -> tuple[torch._ops.OpOverload, ...]:
    op = trial.example.op
    return operators_of_gradient(op, *trial.example.call) if op in RULES else ()


def _may_move(trial: Trial, inputs: Inputs, of_gradient: tuple[torch._ops.OpOverload, ...]) -> bool:
    """Whether gradients may be redistributed: where a rule says so, or torch does.

    torch redistributes what it likes for an operator without a rule of ours, and for its own operators in a gradient
    what has fewer rows than there are ranks.
    """
    ruled = [o for o in of_gradient if o in RULES]
    torch_decides = len(ruled) < len(of_gradient) and trial.kind(inputs) == EMPTY
    return trial.example.op not in RULES or torch_decides or any(RULES[o].redistribute for o in ruled)
