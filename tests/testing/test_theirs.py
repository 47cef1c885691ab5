"""What transformers' own parallel training shows: docs/check.md has the table."""

import functools
from dataclasses import replace

import pytest

from moesaic.testing import Pools, check_gradients
from tests.testing import theirs

pytestmark = pytest.mark.long

LAYOUTS = [
    {"fsdp": 2},
    {"tp": 2},
    {"tp": 2, "ep": 2},
    {"fsdp": 2, "ep": 2},
    {"fsdp": 2, "tp": 2, "ep": 2},
    {"fsdp": 2, "tp": 2, "ep": 4},
]


@pytest.fixture(scope="module")
def pools():
    pools = Pools()
    yield pools
    pools.stop()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_sharding_is_right(pools, family):
    report = check_gradients(theirs.check(family, *LAYOUTS), pools)
    assert report.ok, report


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_losses_are_those_of_each_rank(pools, family):
    check = theirs.check(family, {"fsdp": 2}, {"tp": 2, "ep": 2}, {"fsdp": 2, "ep": 2})
    uneven = check_gradients(replace(check, inputs=theirs.uneven_inputs, loss=None), pools)
    assert [r.ok for r in uneven.layouts] == [False, True, False], uneven
    assert {f.kind for f in uneven.findings} == {"tokens"}, uneven
    build = functools.partial(theirs.build, family, True)
    balanced = check_gradients(replace(check, build=build, loss=theirs.loss_of_the_model), pools)
    assert [r.ok for r in balanced.layouts] == [False, True, False], balanced
    assert {f.kind for r in balanced.layouts for f in r.findings[:1]} == {"batches"}, balanced
