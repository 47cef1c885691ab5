"""What the notation can say, and a proof so told finds nothing wrong and nothing missing."""

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.sharding import NotationError, parse
from tests.sharding import planted
from tests.sharding.planted import AVG, ONE, S0, S1, TWO, P, R, random, ruled
from tests.sharding.simulated import simulated_ranks

pytestmark = pytest.mark.usefixtures("unchecked")  # several times as fast

x, w = random(12, 13), random(13, 14)
options = {"axes": (2, 3), "meshes": [(2, 2)], "backward": False}


def test_a_mean_over_a_dim_that_is_cut_evenly():
    op = ruled(ONE, planted.mean, "m k% -> avg: m", linear=["x"])
    report = moesaic.prove(op, random(13, 12), **options)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"
    assert (((S1,),), ((AVG,),)) in [(r.inputs, r.outputs) for r in report.admitted]
    with (
        simulated_ranks(2) as ranks,
        pytest.raises(moesaic.ShardingError, match="'k' is 13, cut where it divides evenly"),
    ):
        op(ranks.place(x, [S1]))
    with pytest.raises(NotationError, match="factor 'k' stays whole"):
        parse("m (b k%), b -> m")


def two_rows(x: Tensor, w: Tensor) -> Tensor:
    torch._check(x.device.type == "meta" or x.shape[0] >= 2, lambda: "it takes two rows or more")
    return x @ w


def test_kernels_that_need_some_rows():
    rule = {"linear": ["x", "w"]}
    report = moesaic.prove(ruled(TWO, two_rows, "m k, k n -> m n", **rule), x, w, **options)
    assert {r.inputs for r in report.wrong} == {((S0,), (R,))}
    op = ruled(TWO, two_rows, "m k, k n -> m n", **rule, at_least={"m": 2})
    report = moesaic.prove(op, x, w, **options)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"
    with (
        simulated_ranks(2, 2) as ranks,
        pytest.raises(moesaic.ShardingError, match="'m' is 5, cut where each rank has 2"),
    ):
        op(ranks.place(x[:5], [S0, S0]), ranks.place(w, [R, R]))
    for least, problem in (({"j": 2}, "no line cuts 'j'"), ({"m": 0}, "'m' is 0; give how much")):
        with pytest.raises(ValueError, match=problem):
            ruled(TWO, two_rows, "m k, k n -> m n", at_least=least)


@pytest.mark.parametrize("more", [(), (4,), (2, 3)])
def test_any_number_of_dims(more):
    op = ruled(TWO, planted.matmul, "... m k, ... k n -> ... m n", linear=["x", "w"])
    report = moesaic.prove(op, random(*more, 5, 6), random(*more, 6, 4), axes=(2,), meshes=[], backward=False)
    assert report.ok, f"{report}"
    assert report.complete, f"{report}"
    at = len(more)
    expected = {(torch.distributed.tensor.Shard(at + 1), torch.distributed.tensor.Shard(at))}
    assert expected <= {tuple(p for (p,) in r.inputs) for r in report.admitted if r.outputs == ((P,),)}
    wrong = ruled(ONE, lambda x: x.cumsum(0), "... n -> ... n", linear=["x"])
    assert moesaic.prove(wrong, random(*more, 5, 6), axes=(2,), meshes=[], backward=False).wrong


def test_any_number_of_dims_has_to_be_the_same():
    op = ruled(TWO, planted.matmul, "... m k, ... k n -> ... m n", linear=["x", "w"])
    with simulated_ranks(2) as ranks, pytest.raises(moesaic.ShardingError, match="no line of its rule fits the shapes"):
        op(ranks.place(random(2, 5, 6), [R]), ranks.place(random(6, 4), [R]))
    with pytest.raises(NotationError, match="inside"):
        parse("(... m) -> m")


@pytest.mark.parametrize("line", ["mk,kn->mn", "mk, kn -> mk"])
def test_words_that_are_meant_to_be_letters(line):
    with pytest.raises(ValueError, match=f"write 'm k, k n -> m {line[-1]}'"):
        moesaic.prove(ruled(TWO, planted.matmul, line), x, w, **options)


def test_embeddings_of_torch_whose_rows_are_cut():
    ids = torch.tensor([[3, 0, 13], [5, 6, 12], [1, 1, 4], [7, 8, 9]])
    report = moesaic.prove(torch.ops.aten.embedding.default, random(14, 6), ids, axes=(3,), meshes=[(2, 2)])
    assert report.ok, f"{report}"
    assert (((S0,), (R,)), ((P,),)) in [(r.inputs, r.outputs) for r in report.admitted]
