"""Rules of ours, changed in one place: the proof says that they are wrong where they are, and only there."""

import contextlib
import importlib
import random
from collections import defaultdict
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import Replicate

import moesaic
from moesaic.sharding import rule_of
from moesaic.sharding.decide import overload_of
from moesaic.sharding.proof.examples import Example, line_for
from moesaic.sharding.proof.placing import mesh_placements
from moesaic.sharding.proof.search import Search, Standing
from tests.sharding import proofs_of_ours, proofs_of_quantized
from tests.sharding.mutants import mutants, rows, ruled_by
from tests.sharding.proofs_of_ours import permuting
from tests.sharding.test_prove_lora import call_of
from tests.sharding.test_prove_quantized import SOME

prove_module = importlib.import_module("moesaic.sharding.prove")  # not the function of its name
pytestmark = pytest.mark.usefixtures("unchecked")  # several times as fast

OPTIONS = {"meshes": [], "backward": False, "make_up": False}
CALLS = proofs_of_ours.CALLS | {name: (*proofs_of_quantized.CALLS[name], {}) for name in SOME}
CALLS["experts_lora, fewer"] = torch.ops.moesaic.experts_lora, (*call_of("fewer"), "silu", None, 0.3), {}
# Of these a mutant takes less than a second.
SAMPLED = ["grouped_mm, own", "input_grad, shared", "permute", "combine"]
SAMPLE = 3


def proofs(name, most=None):
    """Of each mutant of the line that an example uses: what was changed, whether it is wrong, and the report on it."""
    op, args, _ = CALLS[name]
    op = overload_of(op)
    whole = replace(rule_of(op), redistribute=frozenset())
    # Nothing is redistributed: what is admitted is what a line says. Of blocks there are sizes that an axis cuts amiss.
    # Some forms with fewer experts than blocks have room for are cut amiss on 3 ranks only, some on 4.
    axes = (3,) if name in permuting() else (2, 3, 4) if name.endswith("fewer") else (2, 3)
    options = OPTIONS | {"axes": axes}
    with ruled_by(op, whole):
        report = moesaic.prove(op, *args, **options)
    (text,) = {record.line for record in report.admitted}
    (line,) = [line for line in whole.lines if line.text == text]
    rule = replace(whole, lines=(line,))
    present = tuple(name in report.admitted[0].case.names for name in rule.tensors)
    right = defaultdict(list)
    # Of parts of sums the rule also admits what is whole, and one rank keeps it: without the "+" that is no more right.
    as_it_is = {inputs for inputs, _ in rows(rule, present)}
    admitted = [row for row in map(one_axis, report.admitted) if row[0] in as_it_is]
    for inputs, outputs in (*admitted, *map(one_axis, report.missing)):
        right[inputs].append(outputs)
    given = [a for a in args if isinstance(a, torch.Tensor)]
    example = Example(op, args)
    results = [result.shape for result in example.run()]
    # Of some the patterns do not fit any more: such a call raises.
    changed = [(what, mutant) for what, mutant in mutants(rule) if line_for(example, mutant, results)]
    # A letter of tensors that are not given cuts nothing.
    patterns = line.given(present)
    letters = set().union(*(pattern.factors for pattern in (*patterns.inputs, *patterns.outputs)))
    changed = [(what, m) for what, m in changed if not what.endswith("without !") or what.split()[0] in letters]
    if most is not None:
        changed = random.Random(name).sample(changed, most)
    for what, mutant in changed:
        admitted = rows(mutant, present)
        read = [unread_whole(row, patterns.inputs) for row in admitted]
        wrong = "cut in the middle" in what or any(not is_right(row, right, given) for row in read)
        # Most of what is wrong shows on two ranks, and then no more are needed. What is right is tried on two alone.
        for some in [{"axes": (2,)}, {}] if wrong else [{"axes": (2,)}]:
            with ruled_by(op, mutant), looking_at([inputs for inputs, _ in admitted]), looking_for_what_is_wrong():
                found = moesaic.prove(op, *args, **options | some)
            if found.wrong:
                break
        yield what, wrong, found


@contextlib.contextmanager
def looking_at(choices):
    """Let the proof look at these placements only. What a rule admits is always among those that it looks at."""

    def on_one_axis(trial, rule):
        of_tensors = [set(mesh_placements(t.ndim, t.dtype, 1)) for t in trial.example.tensors]
        on_axis = [tuple((p,) for p in choice) for choice in choices]
        some = [c for c in on_axis if all(p in there for p, there in zip(c, of_tensors, strict=True))]
        return some, len(some)

    with mock.patch.object(prove_module, "on_one_axis", on_one_axis):
        yield


class UntilWrong(Search):
    """Ends with the first thing that is wrong."""

    def judge(self, trial, choices):
        for start in range(0, len(choices), 8):
            if not self.found["wrong"]:
                super().judge(trial, choices[start : start + 8])


@contextlib.contextmanager
def looking_for_what_is_wrong():
    """Let the proof not ask what is missing."""
    with mock.patch.object(prove_module, "Search", UntilWrong), mock.patch.object(Standing, "update"):
        yield


def unread_whole(row, patterns):
    """The row with whole tensors where only shapes are read: what is right for these is right for parts of sums."""
    inputs, outputs = row
    return tuple(
        Replicate() if pattern.shape_only and p.is_partial() else p for p, pattern in zip(inputs, patterns, strict=True)
    ), outputs


def is_right(row, right, given):
    """Whether a row is among those that are right; what all ranks have alike is also the mean and the largest of it."""
    inputs, outputs = row
    if any(p.is_partial("avg") and not t.is_floating_point() for p, t in zip(inputs, given, strict=True)):
        return True  # no such tensor
    return any(
        all(
            a == b or (b.is_replicate() and a.is_partial() and not a.is_partial("sum"))
            for a, b in zip(outputs, of, strict=True)
        )
        for of in right.get(inputs, ())
    )


def one_axis(record):
    return tuple(p for (p,) in record.inputs), tuple(p for (p,) in record.outputs)


def check(name, most=None):
    looked_at = 0
    for what, wrong, report in proofs(name, most):
        assert bool(report.wrong) == wrong, f"{name}, {what}: {report}"
        looked_at += 1
    assert looked_at


@pytest.mark.parametrize("name", SAMPLED)
def test_some_mutants_of_our_rules(name):
    check(name, SAMPLE)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CALLS)
def test_all_mutants_of_our_rules(name):
    check(name)
