"""torch's own operators: held against DTensor's propagation, and against torch's private validator of its rules."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Placement

import moesaic
from moesaic.sharding.proof.placing import shard_sizes
from tests.sharding.planted import AVG, MAX, S0, S1, S2, P, R, random

pytestmark = pytest.mark.usefixtures("unchecked")  # several times as fast

aten = torch.ops.aten
# Sizes that two ranks divide: torch's validator tests no others.
CALLS = {
    "mm": (aten.mm.default, random(12, 8), random(8, 16)),
    "add": (aten.add.Tensor, random(12, 8), random(12, 8, seed=1)),
    "relu": (aten.relu.default, random(12, 8)),
    "sum": (aten.sum.dim_IntList, random(12, 8), [1]),
    "amax": (aten.amax.default, random(12, 8), [1]),
    "_grouped_mm": (
        aten._grouped_mm.default,
        random(24, 16).bfloat16(),
        random(3, 16, 32).bfloat16(),
        torch.tensor([5, 11, 24], dtype=torch.int32),
    ),
}


@pytest.fixture(scope="module")
def validator():
    pytest.importorskip("expecttest", reason="torch's validator of rules needs it")
    module = pytest.importorskip("torch.distributed.tensor._ops.strategy_validation", reason="since torch 2.11")
    if not hasattr(module, "_validate_aten_op_for_sample"):
        pytest.skip("this torch has only a part of its validator")
    return module


def their_findings(validator, name: str) -> tuple[set, set]:
    """What torch's validator says is wrong and is missing on two ranks."""
    op, *args = CALLS[name]
    stats = validator.ComparisonStats()
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        validator._validate_aten_op_for_sample(op, tuple(args), {}, op(*args), 2, False, False, 0, "", stats)
    finally:
        dist.destroy_process_group()
    assert stats.true_positives
    wrong, missing = (
        {(*d.input_placements, *d.output_placements) for d in found}
        for found in (stats.false_positives, stats.false_negatives)
    )
    return wrong, missing


def our_findings(name: str) -> tuple[set, set]:
    """What we say, of the sizes that are given."""
    op, *args = CALLS[name]
    report = moesaic.prove(op, *args, axes=(2,), meshes=[], backward=False)
    shapes = tuple(tuple(t.shape) for t in args if isinstance(t, Tensor))
    wrong, missing = (
        {tuple(str(p) for (p,) in (*r.inputs, *r.outputs)) for r in found if r.case.shapes == shapes}
        for found in (report.wrong, report.missing)
    )
    return wrong, missing


def text(*placements: Placement) -> tuple[str, ...]:
    return tuple(map(str, placements))


@pytest.mark.parametrize("name", ["mm", "add", "sum", "amax"])
def test_as_torch_finds_itself(validator, name):
    assert our_findings(name) == their_findings(validator, name)


def test_where_torch_finds_what_is_not_there(validator):
    # The smaller values that it makes for Partial(max) are all negative: in a sum, relu of them counts for nothing.
    assert our_findings("relu") == (set(), set())
    assert their_findings(validator, "relu") == (set(), {text(MAX, P)})


def test_a_mean_that_a_sum_would_pass_through():
    assert our_findings("sum") == (set(), {text(AVG, AVG)})


def test_largest_of_a_dim_that_a_rank_has_nothing_of():
    op, *args = CALLS["amax"]
    (wrong,) = moesaic.prove(op, *args, axes=(2, 4), meshes=[]).wrong
    assert (wrong.inputs, wrong.outputs) == (((S1,),), ((MAX,),))
    assert "non-zero size" in wrong.error
    assert 0 in shard_sizes(wrong.case.shapes[0][1], wrong.case.mesh[0])


def test_grouped_mm_of_torch():
    op, *args = CALLS["_grouped_mm"]
    report = moesaic.prove(op, *args, axes=(2, 4), meshes=[])
    assert report.ok, f"{report}"
    found = {tuple(p for (p,) in r.inputs): r.outputs[0][0] for r in report.missing}
    assert found == {(R, AVG, R): AVG, (AVG, R, R): AVG}
    moved = {tuple(p for (p,) in r.inputs): r.error for r in report.hidden}
    # Experts are gathered, and tokens.
    assert moved[R, S0, R] == "mat2: S(0) to R"
    assert moved[S0, R, R] == "self: S(0) to R"
    # Two of the matrix dims are as they should be.
    admitted = {tuple(p for (p,) in r.inputs): r.outputs[0][0] for r in report.admitted}
    assert admitted[R, S2, R] == S1
    assert admitted[S1, S1, R] == P
