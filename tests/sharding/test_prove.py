"""The proof finds what is planted: rules that are wrong, and rules that are not all there is."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Placement

import moesaic
from tests.sharding import planted
from tests.sharding.planted import AVG, BIASED, MAX, MIN, ONE, PAIR, S0, S1, TWO, P, R, random, ruled

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]  # ten times as fast

x, w, bias = random(12, 13), random(13, 14), random(14)
square, like = random(12, 12), torch.arange(6)
both_ways = {"max": ["x"], "min": ["x"]}


@dataclass(frozen=True)
class Planted:
    """An operator with a rule, and what the proof should say: inputs, outputs, and for what is wrong a bit of why."""

    op: torch.library.CustomOpDef
    inputs: tuple[Tensor, ...]
    found: dict[tuple[tuple[Placement, ...], tuple[Placement, ...]], str] = field(default_factory=dict)


RIGHT = {
    "matmul": Planted(ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x", "w"]), (x, w)),
    "affine": Planted(
        ruled(
            BIASED,
            planted.affine,
            "m k, k n, +n -> m n",
            linear=["x", "w"],
            preserves={"max": ["bias"], "min": ["bias"]},
        ),
        (x, w, bias),
    ),
    "add": Planted(
        ruled(TWO, torch.add, "m n, m n -> m n", linear=[("x", "w")], preserves={"max": ["x", "w"], "min": ["x", "w"]}),
        (x, random(12, 13, seed=1)),
    ),
    "sum": Planted(ruled(ONE, planted.total, "m k -> m", linear=["x"]), (x,)),
    "largest": Planted(ruled(ONE, planted.largest, "m k -> max: m", preserves={"max": ["x"]}), (x,)),
    "relu": Planted(ruled(ONE, planted.relu, "m n -> m n", preserves=both_ways), (x,)),
    "softmax": Planted(ruled(ONE, planted.softmax, "m n! -> m n!"), (x,)),
    "two results": Planted(ruled(PAIR, planted.totals_of_both, "m k -> m, k", linear=["x"]), (x,)),
    "blocks": Planted(ruled(TWO, planted.totals_of_blocks, "(b c) k, ~b -> b k", linear=["x"]), (x, like)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_rules(name):
    meshes = [(2, 3)] if len(RIGHT[name].inputs) < 3 else []
    report = moesaic.prove(RIGHT[name].op, *RIGHT[name].inputs, meshes=meshes)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"
    assert report.admitted


WRONG = {
    "a sum said not to depend on what it sums": Planted(
        ruled(ONE, planted.total, "m k -> same k: m"),
        (x,),
        {((S1,), (R,)): "ranks differ, which is not R (right is P)"},
    ),
    "a term inside of the sum said to be added to it": Planted(
        ruled(TWO, planted.total_with_term, "m k, +k: m -> m"),
        (x, x[:, 0]),
        {((S1, P), (P,)): "as P, got", ((S1, R), (P,)): "as P, got"},
    ),
    "a sum that is said to be whole": Planted(
        planted.without_partial(ruled(TWO, planted.matmul, "m k, k n -> m n")),
        (x, w),
        {((S1, S0), (R,)): "ranks differ, which is not R (right is P)"},
    ),
    "dims swapped": Planted(
        ruled(TWO, planted.matmul, "m k, k n -> n m", linear=["x", "w"]),
        (x, random(13, 12)),
        {((S0, R), (S1,)): "(right is S(0))", ((R, S1), (S0,)): "(right is S(1))"},
    ),
    "a bias counted on every rank": Planted(
        ruled(BIASED, planted.affine, "m k, k n, n -> m n"), (x, w, bias), {((S1, S0, R), (P,)): "as P, got"}
    ),
    "a mean of what is a sum": Planted(
        ruled(ONE, planted.total, "m k -> avg: m", linear=["x"]), (x,), {((S1,), (AVG,)): "(right is P)"}
    ),
    "a sum of what is a mean": Planted(
        ruled(ONE, planted.mean, "m k -> m", linear=["x"]), (x,), {((S1,), (P,)): "as P, got"}
    ),
    "right only where sizes divide": Planted(
        ruled(ONE, planted.mean, "m k -> avg: m", linear=["x"]), (x,), {((S1,), (AVG,)): "as P(avg), got"}
    ),
    "blocks cut in the middle": Planted(
        ruled(TWO, planted.totals_of_blocks, "(c b) k, ~b! -> b! k", linear=["x"]),
        (x, like),
        {((S0, p), (P,)): "as P, got" for p in (R, P, MAX, MIN)},
    ),
    "linear, of what is not": Planted(
        ruled(ONE, planted.relu, "m n -> m n", linear=["x"], preserves=both_ways),
        (x,),
        {((P,), (P,)): "as P, got", ((AVG,), (AVG,)): "as P(avg), got"},
    ),
    "linear alone, of what is so jointly": Planted(
        ruled(TWO, torch.add, "m n, m n -> m n", linear=["x", "w"]),
        (x, random(12, 13, seed=1)),
        {((P, R), (P,)): "as P, got", ((R, P), (P,)): "as P, got"},
    ),
    "the smallest of what is the largest": Planted(
        ruled(ONE, planted.largest, "m k -> min: m"), (x,), {((S1,), (MIN,)): "(right is P(max))"}
    ),
    "largest values kept, by what turns them round": Planted(
        ruled(ONE, torch.neg, "m n -> m n", linear=["x"], preserves={"max": ["x"]}),
        (x,),
        {((MAX,), (MAX,)): "(right is P(min))"},
    ),
    "a whole factor that is cut": Planted(
        ruled(ONE, planted.softmax, "m n -> m n"), (x,), {((S1,), (S1,)): "as S(1), got"}
    ),
    "the second of two results": Planted(
        ruled(PAIR, planted.totals_of_both, "m k -> m, m", linear=["x"]),
        (square,),
        {((S0,), (S0, S0)): "result 1: ", ((S1,), (P, P)): "result 1: "},
    ),
    "values read of what is said to be a shape": Planted(
        ruled(TWO, torch.mul, "m n, ~m n -> m n"),
        (x, random(12, 13, seed=1)),
        {((R, p), (R,)): "ranks differ, which is not R" for p in (P, AVG, MAX, MIN)},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules(name):
    wrong = WRONG[name]
    report = moesaic.prove(wrong.op, *wrong.inputs, axes=(2, 4), meshes=[(2, 2)] if len(wrong.inputs) < 3 else [])
    assert not report.ok
    found = {key(r): r.error for r in report.wrong if len(r.case.mesh) == 1}
    assert found.keys() == {one_axis(*k) for k in wrong.found}, f"{report}"
    for k, why in wrong.found.items():
        assert why in found[one_axis(*k)], f"{report}"
    assert not [r for r in report.wrong if len(r.case.mesh) > 1], "what is wrong on one axis is said once"


def test_right_only_where_sizes_divide_is_found_where_they_do_not():
    report = moesaic.prove(WRONG["right only where sizes divide"].op, x, axes=(3, 4))
    (wrong,) = report.wrong
    assert wrong.case.shapes[0][1] % wrong.case.mesh[0]


MISSING = {
    "a summed factor": Planted(
        ruled(TWO, planted.matmul, "m k!, k! n -> m n", linear=["x", "w"]), (x, w), {((S1, S0), (P,)): ""}
    ),
    "a parallel factor": Planted(
        ruled(TWO, planted.matmul, "m! k, k n -> m! n", linear=["x", "w"]), (x, w), {((S0, R), (S0,)): ""}
    ),
    "linear in an argument": Planted(
        ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x"]),
        (x, w),
        {((R, P), (P,)): "", ((R, AVG), (AVG,)): ""},
    ),
    "largest and smallest values": Planted(
        ruled(ONE, planted.relu, "m n -> m n"), (x,), {((MAX,), (MAX,)): "", ((MIN,), (MIN,)): ""}
    ),
    "one factor of two results": Planted(
        ruled(PAIR, planted.totals_of_both, "m! k -> m!, k", linear=["x"]), (x,), {((S0,), (S0, P)): ""}
    ),
    "blocks, where they divide": Planted(
        ruled(TWO, planted.totals_of_blocks, "(b c) k, ~b! -> b! k", linear=["x"]), (x, like), {((S0, S0), (S0,)): ""}
    ),
    "a term": Planted(
        ruled(BIASED, planted.affine, "m k!, k! n, n -> m n", linear=[("x", "bias"), ("w", "bias")]),
        (x, w, bias),
        {
            ((S1, S0, P), (P,)): "",
            **{((R, R, p), (p,)): "" for p in (MAX, MIN)},
        },
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_rules(name):
    missing = MISSING[name]
    report = moesaic.prove(missing.op, *missing.inputs, axes=(2, 3), meshes=[(2, 3)] if len(missing.inputs) < 3 else [])
    assert report.ok, f"{report}"
    assert {key(r) for r in report.missing} == {one_axis(*k) for k in missing.found}, f"{report}"
    assert not report.complete


def test_blocks_are_missing_only_where_they_divide():
    report = moesaic.prove(MISSING["blocks, where they divide"].op, x, like, axes=(4, 3), meshes=[])
    (missing,) = report.missing
    assert like.numel() % missing.case.mesh[0] == 0


def test_results_whose_shards_have_other_sizes_are_right_only_where_they_divide():
    # Of five rows two ranks have three and two; twice as many are six and four, where shards are five and five.
    op = ruled(ONE, lambda x: x.repeat_interleave(2, 0), "m! k -> r! k", linear=["x"], preserves=both_ways)
    report = moesaic.prove(op, random(13, 5), axes=(2, 3), meshes=[])
    assert report.ok, f"{report}"
    (missing,) = report.missing
    assert key(missing) == one_axis((S0,), (S0,))
    assert missing.case.shapes[0][0] % missing.case.mesh[0] == 0


def one_axis(inputs, outputs):
    return tuple((p,) for p in inputs), tuple((p,) for p in outputs)


def key(record):
    return record.inputs, record.outputs
