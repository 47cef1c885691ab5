"""The proof finds backward operators whose rules are wrong, or refuse what autograd brings."""

import pytest
import torch
import torch.distributed as dist

import moesaic
from tests.sharding import planted
from tests.sharding.planted import MAX, ONE, S0, S1, TWO, R, differentiable, random, ruled, without_partial

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]  # several times as fast

x, w = random(12, 13), random(13, 14)


def matmul(backward):
    return differentiable(ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x", "w"]), backward)


def only_wrong(op, *inputs, meshes=()):
    report = moesaic.prove(op, *inputs, axes=(2, 3), meshes=meshes)
    assert not report.ok
    return {(tuple(p for (p,) in r.inputs)): r.error for r in report.wrong}


def test_a_gradient_of_operators_that_torch_has_rules_for():
    op = matmul(lambda grad, x, w: (grad @ w.mT, x.mT @ grad))
    report = moesaic.prove(op, x, w, meshes=[(2, 2)])
    assert report.ok, f"{report}"
    assert not report.notes


def test_values_of_a_gradient():
    # The mask of the largest of the terms is not the largest of the masks of the terms.
    masked = ruled(
        TWO,
        lambda x, w: x * (w > 0),
        "m n, m n -> m n",
        linear=["x"],
        redistribute=["x"],
        preserves={"max": ["w"]},
    )
    op = ruled(ONE, planted.relu, "m n -> m n", preserves={"max": ["x"]})
    wrong = only_wrong(differentiable(op, lambda grad, x: masked(grad, x)), x)
    assert wrong.keys() == {(MAX,)}
    assert "the gradient of x, from the backward of a gradient that is R, is off by" in wrong[(MAX,)]


def test_a_gradient_that_is_summed_and_said_to_be_whole():
    scale = ruled(TWO, lambda x, w: x * w, "m n, -> m n", linear=["x", "w"])
    dot = without_partial(
        ruled(TWO, lambda x, w: (x * w).sum(), "m n, m n -> ", linear=["x", "w"], redistribute=["x", "w"])
    )
    wrong = only_wrong(differentiable(scale, lambda grad, x, w: (scale(grad, w), dot(grad, x))), x, torch.tensor(1.7))
    assert {(S0, R), (S1, R)} <= wrong.keys()
    assert (
        "the gradient of w, from the backward of a gradient that is S(0), says it is R, but its parts" in wrong[S0, R]
    )


def test_a_gradient_that_refuses_what_a_sum_brings():
    def grads(movable):
        rule = {"linear": ["x", "w"], "redistribute": movable}
        gx = ruled(TWO, lambda x, w: x @ w.mT, "m n, k n -> m k", **rule)
        gw = ruled(TWO, lambda x, w: w.mT @ x, "m n, m k -> k n", **rule)
        return lambda grad, x, w: (gx(grad, w), gw(grad, x))

    report = moesaic.prove(matmul(grads(movable=[])), x, w, axes=(2, 3), meshes=[])
    assert report.wrong == [], "nothing is computed wrongly"
    assert not report.ok
    stuck = {tuple(p for (p,) in r.inputs): r.error for r in report.stuck}
    assert stuck.keys() == {(S0, R), (R, S1)}
    assert "the backward of a gradient that is R raised ShardingError" in stuck[S0, R]
    assert "sharding_rule(..., redistribute=['x']) allows it" in str(report)
    assert str(report).endswith("GRADIENTS REFUSED, nothing missing")
    assert moesaic.prove(matmul(grads(movable=["x"])), x, w, axes=(2, 3), meshes=[]).ok


def test_a_gradient_that_communicates():
    op = ruled(ONE, planted.total, "m k -> m", linear=["x"])
    wrong = only_wrong(differentiable(op, lambda grad, x: (grad[:, None] * (x / x.sum())).expand_as(x)), x)
    assert "communicates: 1 c10d_functional.all_reduce" in wrong[(S0,)]


@pytest.mark.parametrize("blocks", [pytest.param(5, marks=pytest.mark.long), 12])
def test_a_gradient_of_blocks_that_divide_only_when_narrowed(blocks):
    op = ruled("(Tensor x, Tensor like) -> Tensor", planted.totals_of_blocks, "(b c) d, ~b -> b d", linear=["x"])
    # The number of rows is that of all ranks together.
    repeat = ruled(
        "(Tensor x, int rows) -> Tensor",
        lambda x, rows: x.repeat_interleave(rows // x.shape[0], 0),
        "b d -> (b c) d",
        linear=["x"],
    )
    op.register_autograd(
        lambda ctx, grad: (repeat(grad, ctx.rows), None),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "rows", inputs[0].shape[0]),
    )
    wrong = only_wrong(op, random(blocks * 4, 13), random(blocks))
    assert wrong.keys() == {(S0, S0)}
    assert "the gradient of x, from the backward of a gradient that is S(0), is misshapen" in wrong[S0, S0]


def test_no_gradient():
    def refuse(grad, x):
        raise NotImplementedError("not of this one")

    without = ruled(ONE, planted.relu, "m n -> m n", preserves={"max": ["x"], "min": ["x"]})
    refusing = differentiable(ruled(ONE, planted.relu, "m n -> m n"), refuse)
    for op, why in ((without, "no autograd formula was registered"), (refusing, "not of this one")):
        report = moesaic.prove(op, x, axes=(2,), meshes=[])
        assert report.ok
        assert [note for note in report.notes if note.startswith("no gradient") and why in note]
    assert moesaic.prove(refusing, x, axes=(2,), meshes=[], backward=False).notes == []


def test_no_process_group_is_needed_or_left():
    assert not dist.is_initialized()
    assert moesaic.prove(matmul(lambda grad, x, w: (grad @ w.mT, x.mT @ grad)), x, w, axes=(2,), meshes=[]).ok
    assert not dist.is_initialized()


def test_no_process_group_is_left_by_a_proof_that_fails(monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.sharding.proof.gradients._compare", fail)
    with pytest.raises(KeyboardInterrupt):
        moesaic.prove(matmul(lambda grad, x, w: (grad @ w.mT, x.mT @ grad)), x, w, axes=(2,), meshes=[])
    assert not dist.is_initialized()


def test_a_process_group_that_is_there():
    op = matmul(lambda grad, x, w: (grad @ w.mT, x.mT @ grad))
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="there is a process group already.*backward=False"):
            moesaic.prove(op, x, w)
        assert moesaic.prove(op, x, w, axes=(2,), meshes=[], backward=False).ok
        assert dist.get_world_size() == 2
    finally:
        dist.destroy_process_group()
