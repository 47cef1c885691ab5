"""A plan read from rules: where arguments, results and gradients lie on a mesh."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from moesaic.sharding import on
from moesaic.sharding.rule import make_rule

R, P, ops = Replicate(), Partial(), torch.ops.moesaic

ROWS, BY_COLUMNS, BY_ROWS = (Shard(0), R), (Shard(0), Shard(2)), (Shard(0), Shard(1))


def test_the_experts_on_ep_and_etp():
    places = on(ops.experts_mlp, ep="b", etp="f") | on(ops.experts_mlp_backward, ep="b", etp="f")
    expected = dict.fromkeys(("x", "ids", "weights", "grad"), ROWS)
    expected |= dict.fromkeys(("z", "grad_x", "grad_weights"), (Shard(0), P))
    expected |= dict.fromkeys(("w1", "w3", "grad_w1", "grad_w3"), BY_COLUMNS)
    expected |= dict.fromkeys(("w2", "b1", "b3", "grad_w2", "grad_b1", "grad_b3"), BY_ROWS)
    assert {name: places[name] for name in expected} == expected


def test_the_gradient_takes_everything_where_it_lies():
    """Nothing moves between the passes, and the gradient of a weight needs no sum."""
    forward = on(ops.experts_mlp, ep="b", etp="f")
    backward = on(ops.experts_mlp_backward, ep="b", etp="f")
    shared = forward.keys() & backward.keys()
    assert {"x", "w1", "w2", "b1", "h1", "h3"} <= shared
    assert {n: forward[n] for n in shared} == {n: backward[n] for n in shared}
    weights = [n for n in forward if n[0] in "wb" and f"grad_{n}" in backward and n != "weights"]
    assert all(forward[n] == backward[f"grad_{n}"] for n in weights)


def test_the_line_that_cuts_all_factors_speaks():
    assert on(ops.grouped_mm, tp="n")["w"] == (Shard(2),)
    assert on(ops.grouped_mm, tp="n", ep="b") == {
        "x": (R, Shard(0)),
        "w": (Shard(2), Shard(0)),
        "group_sizes": (R, Shard(0)),
        "out0": (Shard(1), Shard(0)),
    }
    with pytest.raises(ValueError, match=r"(?s)no line of the rule lets b and z be cut:.*\(b c\) n  \(cuts b, k, n\)"):
        on(ops.grouped_mm, ep="b", tp="z")
    with pytest.raises(KeyError, match="has no sharding rule"):
        on(torch.ops.aten.mm, tp="n")


def test_a_term_is_kept_whole_where_the_result_is_a_sum():
    rule = make_rule(["m k, k n, +n -> m n"], ["x", "w", "bias"], ["y"])
    places = on(rule, dp="m", row="k", column="n")
    assert places["bias"] == (R, R, Shard(0))
    assert places["y"] == (Shard(0), P, Shard(1))
