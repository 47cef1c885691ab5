"""Verdicts on values that no process made: what ranks have beside what they should have."""

import pytest
import torch

from moesaic.testing import Layout
from moesaic.testing.diagnose import Subject, judge
from moesaic.testing.place import everything, find, of_slices, take

LAYOUT = Layout({"dp": 2, "tp": 2, "ep": 2})  # dp joins ranks 0 2 and 1 3, tp and ep 0 1 and 2 3
GENERATOR = torch.Generator().manual_seed(0)
A, B, C, D = torch.randn(4, 6, 5, generator=GENERATOR, dtype=torch.float64)
WHOLE = A + B


def of(*values, whole=WHOLE, slices=None, **others):
    """A subject whose ranks have these values, of all of it or of slices of its rows."""
    places = [everything(whole) if slices is None else of_slices(whole, (s,)) for s in slices or [None] * len(values)]
    parts = [None if v is None else (v, place) for v, place in zip(values, places, strict=True)]
    given = {"tolerance": 1e-9, "terms": {}, "has_part": [True] * len(parts), **others}
    return Subject(whole, parts, **given)


TOP, BOTTOM = slice(0, 3), slice(3, 6)
HALVES = [TOP, BOTTOM, TOP, BOTTOM]
MIXED = (A[TOP] + A[BOTTOM], B[TOP] + B[BOTTOM])
CASES = {
    "equal": (of(*[WHOLE] * 4), None, None, set()),
    "rounded": (of(*[WHOLE + 1e-11] * 4), None, None, set()),
    "twice": (of(*[2 * WHOLE] * 4), "factor", "2 times", {"dp", "tp", "ep", "edp"}),
    "the world": (of(*[WHOLE / 4] * 4), "factor", "1/4", {"dp x tp", "edp x ep"}),
    "of no axis": (of(*[3 * WHOLE] * 4), "factor", "3 times", set()),
    "zero": (of(*[0 * WHOLE] * 4), "factor", "is zero", set()),
    "not summed over dp": (of(A, A, B, B), "own part", "not summed", {"dp", "edp"}),
    "not summed over tp": (of(A, B, A, B), "own part", "not summed", {"tp", "ep"}),
    "not summed at all": (of(A, B, C, D, whole=A + B + C + D), "own part", "not summed", {"dp x tp", "edp x ep"}),
    "not averaged": (of(2 * A, 2 * A, 2 * B, 2 * B), "own mean", "not averaged", {"dp", "edp"}),
    "over the wrong axis": (of(3 * A, 3 * A, 3 * B, 3 * B), "wrong group", "would be 3 times", {"dp", "edp"}),
    "shards mixed": (
        of(*[WHOLE[TOP] + WHOLE[BOTTOM]] * 4, slices=HALVES),
        "wrong group",
        "is summed over",
        {"tp", "ep"},
    ),
    "shards averaged": (
        of(*[(WHOLE[TOP] + WHOLE[BOTTOM]) / 2] * 4, slices=HALVES),
        "wrong group",
        "is averaged over",
        {"tp", "ep"},
    ),
    "shards mixed, copies apart": (
        of(MIXED[0], MIXED[0], MIXED[1], MIXED[1], slices=HALVES),
        "wrong group",
        "and not over dp or edp",
        {"tp", "ep"},
    ),
    "a term twice": (of(*[A + 2 * B] * 4, terms={"main": A, "aux": B}), "term", "'aux' of the loss counts 2", None),
    "a term not summed": (
        of(C + B, A - C + B, C + B, A - C + B, terms={"main": A, "aux": B}),
        "own part",
        "own part of the term 'main'",
        {"tp", "ep"},
    ),
    "means of ranks": (
        of(*[0.8 * A + 1.6 * B] * 4, shares=[A, A, B, B]),
        "tokens",
        "ranks 0, 2 by 0.8, 1.6",
        set(),
    ),
    "batches alone": (of(*[A + B] * 4, whole=C, shares=[A, A, B, B]), "batches", "each rank's batch", set()),
    "one differs": (of(WHOLE, WHOLE, WHOLE, WHOLE + C), "replicas differ", "differs between", {"dp", "edp"}),
    "all the same and wrong": (of(*[C] * 4), "unrelated", "not related", set()),
    "not a number": (of(*[WHOLE * torch.nan] * 4), "unrelated", "not finite", set()),
    "missing on a rank": (of(WHOLE, None, WHOLE, WHOLE), "missing", "not on rank 1", set()),
    "missing where it is zero": (of(0 * A, None, 0 * A, 0 * A, whole=0 * A), None, None, set()),
    "of another stage": (of(WHOLE, None, WHOLE, None, has_part=[True, False, True, False]), None, None, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_verdict(case):
    subject, kind, piece, axes = CASES[case]
    verdict = judge(subject, LAYOUT, LAYOUT.groups())
    if kind is None:
        assert verdict is None
        return
    assert verdict is not None
    assert verdict.kind == kind, verdict
    assert piece in verdict.text, verdict
    assert axes is None or set(verdict.axes) == axes, verdict


def test_parts_are_found_by_their_values():
    w = torch.randn(8, 6, 5, generator=GENERATOR)
    for part in (w[2:4], w[:, 3:], w[4:, 2:4], w[:, [0, 1, 4, 5]], w[:0], w):
        assert torch.equal(take(w, find(part, w)), part)
    assert find(w, w[:2]) is None
    assert find(w[0], w) is None
    bias = torch.randn(6, generator=GENERATOR)
    assert find(bias[2:4], bias)[0].tolist() == [2, 3]
    # Ones are everywhere: a slice is as good as any.
    assert find(torch.ones(2), torch.ones(4))[0].tolist() == [0, 1]
