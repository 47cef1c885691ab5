"""Which placements on one mesh axis to look at: all, or where an operator has many tensors, the telling ones."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from math import prod

from moesaic.sharding.admission import choices_for
from moesaic.sharding.proof.placing import mesh_placements
from moesaic.sharding.proof.trial import Inputs, Trial
from moesaic.sharding.rule import Placements, Rule

_MOST = 4096
_SAMPLE = 512


def on_one_axis(trial: Trial, rule: Rule | None) -> tuple[list[Inputs], int]:
    """Choices of placements for all tensors, and how many there are.

    Up to a few thousand they are all of them. Of more: what the rule admits, or would without its marks for factors
    that stay whole; all that differ from that in one tensor; and a sample of the others, the same every time.
    """
    of_tensors = [list(mesh_placements(t.ndim, t.dtype, 1)) for t in trial.example.tensors]
    number = prod(map(len, of_tensors))
    if number <= _MOST:
        return list(trial.all_inputs()), number
    likely = _likely(trial, rule)
    others = _random(of_tensors)
    near = chain.from_iterable(_near(inputs, of_tensors) for inputs in likely)
    return list(dict.fromkeys([*likely, *near, *islice(others, _SAMPLE)])), number


def _likely(trial: Trial, rule: Rule | None) -> list[Inputs]:
    line = trial.example.line
    if rule is None or line is None:
        return []
    # The example's has no patterns for the tensors that are not given.
    whole = next(other for other in rule.lines if other.text == line.text).expand(line.num_any)
    present = tuple(name in trial.example.names for name in rule.tensors)
    choices = choices_for(rule, replace(whole, whole=frozenset()), present)
    return [tuple((p,) for p in choice.inputs) for choice in choices]


def _near(inputs: Inputs, of_tensors: Sequence[Sequence[Placements]]) -> Iterator[Inputs]:
    for i, placements in enumerate(of_tensors):
        for other in placements:
            yield (*inputs[:i], other, *inputs[i + 1 :])


def _random(of_tensors: Sequence[Sequence[Placements]]) -> Iterator[Inputs]:
    generator = random.Random(0)
    while True:
        yield tuple(map(generator.choice, of_tensors))
