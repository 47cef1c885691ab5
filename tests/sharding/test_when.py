"""Rules that stand for some values of flags: other calls raise by name, and so does what no call can have."""

import re
from collections.abc import Sequence

import pytest
from torch import Tensor
from torch.distributed.tensor import Shard

import moesaic
from tests.sharding.problems import integers
from tests.sharding.simulated import simulated_ranks
from tests.sharding.test_sharding_rule import define

SCALED = "(Tensor x, Tensor? scale=None, *, int dim=1, int[] sizes=[1]) -> Tensor"


def scaled(x: Tensor, scale: Tensor | None = None, *, dim: int = 1, sizes: Sequence[int] = (1,)) -> Tensor:
    return x * 2


def test_calls_with_flags_that_a_rule_does_not_stand_for_raise_by_name():
    op = define(SCALED, scaled)
    moesaic.sharding_rule("m n!, m -> m n!", when={"dim": [1, -1], "scale": None, "sizes": [1]})(op)
    x, scale = integers(4, 3, seed=1), integers(4, seed=2)
    with simulated_ranks(2) as ranks:
        x_S0, scale_S0 = ranks.place(x, [Shard(0)]), ranks.place(scale, [Shard(0)])
        assert op(x_S0).placements == op(x_S0, dim=-1, sizes=[1]).placements == (Shard(0),)
        for args, flags, name in (
            ((), {"dim": 0}, "dim=0"),
            ((scale_S0,), {}, "scale given"),
            ((), {"sizes": [1, 2]}, r"sizes=\[1, 2\]"),
        ):
            with pytest.raises(moesaic.ShardingError, match=f"its sharding rule does not stand for {name}. It has\n"):
                op(x_S0, *args, **flags)
    moesaic.sharding_rule("m n!, m -> m n!", "m! n, m! -> m! n", when=[{"dim": 1}, {"dim": 0, "sizes": [[1], [2]]}])(op)
    with simulated_ranks(2) as ranks:
        for dim, flags in ((0, {}), (1, {"dim": 0}), (1, {"dim": 0, "sizes": [2]})):
            assert op(ranks.place(x, [Shard(dim)]), **flags).placements == (Shard(dim),)


@pytest.mark.parametrize(
    ("when", "problem"),
    [
        ({"axis": 1}, "has no argument 'axis'; it has x, scale, dim, sizes"),
        ({"x": None}, "'x' is a tensor that every call gives"),
        ({"dim": "1"}, "'dim' is '1', which no call can give: it is an int"),
        ({"dim": None}, "'dim' is None, which no call can give: it is not optional"),
        ({"scale": 1}, "'scale' is 1, which no call can give: it is a tensor. Say None for calls without it"),
        ({"dim": []}, "no value of 'dim'"),
        ([{"dim": 1}, {}], "2 entries for 1 lines"),
    ],
)
def test_flags_that_no_call_has(when, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        moesaic.sharding_rule("m n, m -> m n", when=when)(define(SCALED, scaled))
