"""`sharding_rule` on every kind of operator, and gradients whose operators have no rule."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

import moesaic
from moesaic.sharding import dtensor, rule_of
from moesaic.sharding.formula import operators_of_gradient
from tests.sharding.problems import integers
from tests.sharding.simulated import simulated_ranks, whole
from tests.sharding.test_sharding_rule import MATMUL, define

_numbers = itertools.count()


def matmul(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def product(backward) -> torch.library.CustomOpDef:
    """A matrix product, its gradient made of ``backward``."""
    op = define("(Tensor x, Tensor w) -> Tensor", matmul)

    def gradient(ctx, grad):
        x, w = ctx.saved_tensors
        return backward(grad, w.mT), backward(x.mT, grad)

    op.register_autograd(gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return moesaic.sharding_rule(MATMUL, linear=["x", "w"])(op)


RULE_OF_TORCH = """
import pytest, torch
from torch.distributed.tensor import Partial, Replicate, Shard
import moesaic
from tests.sharding.problems import integers
from tests.sharding.simulated import no_collectives, simulated_ranks, whole

x = integers(3, 3, seed=1)
for op, line in ((torch.ops.aten.mm.default, "m k, k n -> m n"), (torch.ops.aten.add.Tensor, "m n, m n -> m n")):
    moesaic.sharding_rule(line)(op)
    with simulated_ranks(2) as ranks:
        here, there = ranks.place(x, [Shard(0)]), ranks.place(x, [Shard(1)])
        # torch's own rule would gather one of them.
        with pytest.raises(moesaic.ShardingError, match="no sharding rule admits"):
            op(here, there)
        with no_collectives():
            y = op(there, here) if op is torch.ops.aten.mm.default else op(here, here)
        assert torch.equal(whole(y), op(x, x))
moesaic.sharding_rule("m n, m n -> m n", "m n, -> m n", linear=[("self", "other")])(torch.ops.aten.add.Tensor)
with simulated_ranks(2) as ranks:
    # Numbers come for tensors; added on every rank, one would count twice where the result is Partial.
    for number in (1, 1.5, True):
        y = ranks.place(x.float(), [Shard(0)]) + number
        assert y.dtype == (x.float() + number).dtype and torch.equal(whole(y), x.float() + number)
    with pytest.raises(moesaic.ShardingError):
        ranks.place(x, [Partial()]) + 1
print("right")
"""


def test_operators_of_torch(forked_python):
    assert "right" in forked_python(RULE_OF_TORCH).stdout


def test_a_rule_replaces_the_one_before():
    op = define("(Tensor x, Tensor w) -> Tensor", matmul)._opoverload
    x, w = integers(4, 3, seed=1), integers(3, 6, seed=2)
    with simulated_ranks(2) as ranks:
        placed = ranks.place(x, [Replicate()]), ranks.place(w, [Shard(1)])
        moesaic.sharding_rule(MATMUL)(op)
        assert op(*placed).placements == (Shard(1),)
        moesaic.sharding_rule("m k, k n! -> m n")(op)
        with pytest.raises(moesaic.ShardingError):
            op(*placed)


@pytest.mark.parametrize("op", [torch.ops.aten.matmul, torch.ops.aten.linear.default])
def test_an_operator_that_decomposes(op):
    with pytest.raises(ValueError, match="is made of other operators. DTensor sees only those"):
        moesaic.sharding_rule(MATMUL)(op)


def test_a_triton_op():
    @torch.library.triton_op(f"moesaic_test::triton{next(_numbers)}", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    double.register_autograd(lambda ctx, grad: grad * 2)
    assert moesaic.sharding_rule("m n -> m n", linear=["x"])(double) is double
    x = integers(3, 4, seed=1)
    with simulated_ranks(2) as ranks:
        placed = ranks.place(x, [Shard(1)]).requires_grad_()
        y = double(placed)
        assert y.placements == (Shard(1),)
        assert torch.equal(whole(y), x * 2)
        y.sum().backward()
        assert torch.equal(whole(placed.grad), torch.full_like(x, 2))


def test_numbers_that_are_equal_and_not_alike():
    op = define("(Tensor x, Scalar number) -> Tensor", lambda x, number: x * number)
    moesaic.sharding_rule("m -> m")(op)
    x = torch.arange(4)
    with simulated_ranks(2) as ranks:
        for number in (1, 1.0, True, 1):
            y = op(ranks.place(x, [Shard(0)]), number)
            assert y.dtype == y.to_local().dtype == (x * number).dtype


def test_inference_mode():
    op = moesaic.sharding_rule(MATMUL)(define("(Tensor x, Tensor w) -> Tensor", matmul))
    x, w = integers(4, 3, seed=1), integers(3, 6, seed=2)
    with simulated_ranks(2) as ranks, torch.inference_mode():
        y = op(ranks.place(x, [Replicate()]), ranks.place(w, [Shard(1)]))
        assert y.placements == (Shard(1),)
        assert torch.equal(whole(y), x @ w)


def test_what_a_gradient_calls():
    backward = define("(Tensor x, Tensor w) -> Tensor", matmul)
    op = product(backward)
    args = (torch.zeros(2, 3), torch.zeros(3, 4))
    called = operators_of_gradient(op._opoverload, args, {})
    assert backward._opoverload in called
    assert {o.namespace for o in called} == {"aten", "moesaic_test"}
    assert operators_of_gradient(backward._opoverload, args, {}) == ()


def test_a_gradient_without_a_rule_is_refused_in_the_forward_pass():
    backward = define("(Tensor x, Tensor w) -> Tensor", matmul)
    op = product(backward)
    x, w = integers(4, 3, seed=1), integers(3, 6, seed=2)
    name = backward._opoverload._name
    with simulated_ranks(2) as ranks:
        placed = [ranks.place(x, [Replicate()]).requires_grad_(), ranks.place(w, [Shard(1)]).requires_grad_()]
        for _ in range(2):
            with pytest.raises(moesaic.ShardingError, match=f"its gradient calls {name}, which has no sharding rule"):
                op(*placed)
        moesaic.sharding_rule(MATMUL, linear=["x", "w"], redistribute=["x", "w"])(backward)
        op(*placed).sum().backward()
        ones = torch.ones(4, 6).double()
        assert torch.equal(whole(placed[0].grad), ones @ w.mT)
        assert torch.equal(whole(placed[1].grad), x.mT @ ones)


def test_inference_needs_no_gradient():
    op = product(define("(Tensor x, Tensor w) -> Tensor", matmul))
    x, w = integers(4, 3, seed=1), integers(3, 6, seed=2)
    with simulated_ranks(2) as ranks:
        placed = [ranks.place(x, [Replicate()]), ranks.place(w, [Shard(1)])]
        assert torch.equal(whole(op(*placed)), x @ w)
        # The same call as before, but for that.
        placed[0].requires_grad_()
        with pytest.raises(moesaic.ShardingError, match="its gradient calls"):
            op(*placed)


def test_a_gradient_is_looked_at_for_every_flag():
    other = define("(Tensor x) -> Tensor", lambda x: x.clone())
    op = define("(Tensor x, int mode) -> Tensor", lambda x, mode: x.clone())

    def gradient(ctx, grad):
        return other(grad) if ctx.mode else grad, None

    def save(ctx, inputs, output):
        ctx.mode = inputs[1]

    op.register_autograd(gradient, setup_context=save)
    moesaic.sharding_rule("m -> m")(op)
    with simulated_ranks(2) as ranks:
        x = ranks.place(integers(4, seed=1), [Shard(0)]).requires_grad_()
        op(x, 0)
        with pytest.raises(moesaic.ShardingError, match="its gradient calls"):
            op(x, 1)


def test_without_a_fake_kernel():
    @torch.library.custom_op(f"moesaic_test::unfaked{next(_numbers)}", mutates_args=())
    def op(x: Tensor) -> Tensor:
        return x.clone()

    moesaic.sharding_rule("m -> m")(op)
    with simulated_ranks(2) as ranks, pytest.raises(moesaic.ShardingError, match="has no fake kernel.*register_fake"):
        op(ranks.place(integers(4, seed=1), [Shard(0)]))


def test_an_operator_without_a_rule_says_so():
    with pytest.raises(KeyError, match="aten.mm.default has no sharding rule"):
        rule_of(torch.ops.aten.mm)


def test_a_gradient_with_a_rule_of_another_kind():
    backward = define("(Tensor x, Tensor w) -> Tensor", matmul)
    op = product(backward)

    @register_sharding(backward._opoverload)
    def rule(x, w):
        return [([Replicate()], [Replicate(), Replicate()])]

    with simulated_ranks(2) as ranks:
        x = ranks.place(integers(4, 3, seed=1), [Replicate()])
        assert op(x, ranks.place(integers(3, 6, seed=2), [Replicate()])).shape == (4, 6)


def test_a_gradient_that_needs_values_is_left_to_backward():
    op = define("(Tensor x) -> Tensor", lambda x: x.clone())

    def gradient(ctx, grad):
        return grad * float(grad.max())

    op.register_autograd(gradient)
    moesaic.sharding_rule("m -> m")(op)
    x = integers(4, seed=1)
    with simulated_ranks(2) as ranks:
        assert torch.equal(whole(op(ranks.place(x, [Shard(0)]))), x)


def test_the_advice_where_cutting_is_enough():
    op = moesaic.sharding_rule(MATMUL)(define("(Tensor x, Tensor w) -> Tensor", matmul))
    with simulated_ranks(2) as ranks:
        x, w = ranks.place(integers(4, 3, seed=1), [Replicate()]), ranks.place(integers(3, 6, seed=2), [Shard(0)])
        with pytest.raises(moesaic.ShardingError, match=r"sharding_rule\(..., redistribute=\['x'\]\) allows it"):
            op(x, w)


def test_a_full_cache_of_decisions_drops_the_oldest(monkeypatch):
    decided = []
    make_plan = dtensor._make_plan
    monkeypatch.setattr(dtensor, "_make_plan", lambda op, *rest: decided.append(1) or make_plan(op, *rest))
    kept = 16
    monkeypatch.setattr(dtensor, "_MOST_KEPT", kept)
    op = moesaic.sharding_rule("m n -> m n")(define("(Tensor x, int times) -> Tensor", lambda x, times: x * times))
    with simulated_ranks(2) as ranks:
        x = ranks.place(integers(4, 4, seed=1), [Shard(0)])

        def number_decided(flags) -> int:
            decided.clear()
            for times in flags:
                op(x, times)
            return len(decided)

        assert number_decided([*range(kept), 0, kept - 1]) == kept, "all are kept"
        assert number_decided([kept]) == 1
        assert number_decided(range(kept // 4, kept + 1)) == 0, "the later three quarters are there"
        assert number_decided([0]) == 1, "the first is not"
