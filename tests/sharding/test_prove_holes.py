"""Wrong rules that look right at the sizes, values and dtypes of an example: the proof finds them all the same."""

import pytest
import torch

import moesaic
from tests.sharding import planted
from tests.sharding.planted import ONE, S0, TWO, differentiable, random, ruled

pytestmark = pytest.mark.usefixtures("unchecked")  # several times as fast

x = random(12, 13)
IDS = "(Tensor x, Tensor ids) -> Tensor"
ids = torch.arange(24) * 5 % 7


def wrong(op, *inputs, also=(), axes=(2, 3), backward=False):
    """What is found wrong on one axis: placements of the inputs, and why."""
    report = moesaic.prove(op, *inputs, also=also, axes=axes, meshes=[], backward=backward)
    return {tuple(p for (p,) in r.inputs): r.error for r in report.wrong}


def test_dims_of_integers_are_cut_unevenly():
    """Every axis divides 24 tokens, so a mean of means is right there; of 23 it is not."""
    op = ruled(IDS, planted.cross_entropy, "m v!, m -> avg:")
    assert wrong(op, random(24, 7), ids).keys() == {(S0, S0)}


def test_dims_of_integers_are_cut_until_a_rank_has_nothing():
    op = ruled(IDS, planted.largest_of_chosen, "m v!, m -> max:")
    assert "numel() == 0" in wrong(op, random(24, 7), ids)[S0, S0]


def test_gradients_on_shards_that_are_empty():
    kernel = ruled(TWO, planted.twice_but_not_of_nothing, "m n, ~m n -> m n", linear=["x"], redistribute=["x"])
    op = differentiable(ruled(ONE, lambda x: x * 2.0, "m n -> m n", linear=["x"]), kernel)
    found = wrong(op, x, backward=True)
    assert found.keys() == {(S0,)}
    assert "launched with an empty grid" in found[(S0,)]


def test_gradients_of_further_examples():
    """The gradient is wrong for two columns alone."""
    kernel = ruled(
        TWO,
        lambda x, w: x * (x.shape[0] if x.shape[1] == 2 else 1),
        "m n!, m n! -> m n!",
        redistribute=["x"],
    )
    op = differentiable(ruled(ONE, torch.clone, "m n! -> m n!", linear=["x"]), kernel)
    assert (S0,) in wrong(op, random(13, 2), also=[(random(13, 4),)], backward=True)
    assert (S0,) in wrong(op, random(13, 4), also=[(random(13, 2),)], backward=True)
