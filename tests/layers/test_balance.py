"""Balance: the two losses and how they are collected, load counts, and the bias that evens out the load."""

import math
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic.layers import expert_load, reset_expert_load, update_expert_bias
from moesaic.layers.balance import load_balancing_loss, router_z_loss
from tests.layers import naive

BOTH = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}


def parts(scores: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return scores, torch.bincount(ids.flatten(), minlength=num_experts), torch.tensor(ids.shape[0])


def losses_of(layer: nn.Module, x: Tensor) -> list[Tensor]:
    with moesaic.balance_losses() as losses:
        layer(x)
    return losses


# The losses.


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_losses_by_their_formulas(top_k, score):
    T, E = 7, 5
    layer = naive.make(num_experts=E, top_k=top_k, score=score, **BOTH)
    x = naive.tokens(T, 6)
    logits = (x @ layer.router.weight.T).tolist()
    ids = layer.router(x).ids.tolist()
    aux = z = 0.0
    for e in range(E):
        share = sum(row.count(e) for row in ids) / (T * top_k)
        probability = 0.0
        for row in logits:
            scores = [math.exp(v) if score == "softmax" else 1 / (1 + math.exp(-v)) for v in row]
            probability += scores[e] / sum(scores) / T
        aux += E * share * probability
    for row in logits:
        z += math.log(sum(math.exp(v) for v in row)) ** 2 / T
    assert [loss.item() for loss in losses_of(layer, x)] == pytest.approx([0.1 * aux, 0.01 * z], rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_against_transformers(top_k):
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    E = 8
    layer = naive.make(num_experts=E, top_k=top_k, aux_loss_coef=1.0)
    x = naive.tokens(40, 6)
    # Their shares are in fp32, and sum to k: one for each choice. Ours sum to 1.
    theirs = modeling.load_balancing_loss_func((x @ layer.router.weight.T,), E, top_k)
    ours = top_k * losses_of(layer, x)[0]
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)
    [grad] = torch.autograd.grad(ours, layer.router.weight)
    [their_grad] = torch.autograd.grad(theirs, layer.router.weight)
    assert (grad - their_grad).norm() <= 1e-6 * grad.norm()


def test_one_for_a_uniform_router_over_uniform_loads():
    T, E = 12, 4
    ids = torch.arange(T * 2).reshape(T, 2) % E
    loss = load_balancing_loss(*parts(torch.full((T, E), 0.3), ids, E))
    assert loss.item() == pytest.approx(1)


def test_number_of_experts_for_a_router_that_uses_one():
    scores = torch.eye(4)[[2, 2, 2]]
    assert load_balancing_loss(*parts(scores, torch.tensor([[2], [2], [2]]), 4)).item() == pytest.approx(4)


def test_gradient_pushes_probability_away_from_loaded_experts():
    logits = torch.zeros(6, 3, requires_grad=True)
    load_balancing_loss(*parts(logits.softmax(1), torch.tensor([[0], [0], [0], [0], [1], [2]]), 3)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_z_loss_pulls_logits_to_zero():
    logits = torch.tensor([[0.0, 0.0], [30.0, -1.0]], requires_grad=True)
    loss = router_z_loss(logits, torch.tensor(2))
    assert loss.item() == pytest.approx((math.log(2) ** 2 + 30**2) / 2)
    loss.backward()
    assert logits.grad[1, 0] > 20


@pytest.mark.parametrize("sizes", [[4, 4, 4], [9, 0, 3], [12]], ids=str)
def test_parts_sum_to_the_whole(sizes):
    """Processes with tokens of their own, each adding its part of the losses: values and gradients."""
    layer = naive.make(**BOTH)
    x = naive.tokens(12, 6).requires_grad_()
    whole = losses_of(layer, x)
    whole_grads = torch.autograd.grad(sum(whole), (layer.router.weight, x))
    counts = [naive.make().router(part).ids.flatten().bincount(minlength=8) for part in x.split(sizes)]
    layer.router.reduce_counts = lambda mine: sum(counts)
    each = [losses_of(layer, part) for part in x.split(sizes)]
    for ours, theirs in zip(zip(*each, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(ours), theirs)
    total = sum(loss for losses in each for loss in losses)
    torch.testing.assert_close(torch.autograd.grad(total, (layer.router.weight, x)), whole_grads)


def test_losses_are_in_fp32_under_autocast():
    layer = naive.make(torch.float32, **BOTH)
    x = naive.tokens(20, 6, dtype=torch.float32)
    expected = losses_of(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(layer, x)
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert torch.equal(torch.stack(losses), torch.stack(expected))


# Collecting them.


@pytest.mark.parametrize(
    ("options", "number"), [({}, 0), ({"aux_loss_coef": 0.1}, 1), ({"z_loss_coef": 0.1}, 1), (BOTH, 2)]
)
def test_only_what_has_a_coefficient(options, number):
    assert len(losses_of(naive.make(**options), naive.tokens(5, 6))) == number


def test_of_every_layer_in_the_order_of_calls():
    first, second = naive.make(aux_loss_coef=0.1), naive.make(aux_loss_coef=0.2, seed=3)
    x = naive.tokens(5, 6)
    with moesaic.balance_losses() as losses:
        y = first(x)
        second(y)
        second(x)
    expected = [*losses_of(first, x), *losses_of(second, y), *losses_of(second, x)]
    assert torch.equal(torch.stack(losses), torch.stack(expected))


def test_only_inside(unchecked):
    layer, x = naive.make(**BOTH), naive.tokens(5, 6)
    layer(x)
    with moesaic.balance_losses() as losses:
        pass
    layer(x)
    assert losses == []
    # Left by an error, it has ended as well.
    with pytest.raises(ValueError, match="expected"), moesaic.balance_losses() as losses:
        layer(layer(x)[:, 1:])
    layer(x)
    assert len(losses) == 2


def test_the_innermost_collects():
    layer, x = naive.make(**BOTH), naive.tokens(5, 6)
    with moesaic.balance_losses() as outer:
        layer(x)
        with moesaic.balance_losses() as inner:
            layer(x)
        layer(x)
    assert (len(outer), len(inner)) == (4, 2)


def test_threads_do_not_see_each_other():
    layer, x = naive.make(**BOTH), naive.tokens(5, 6)
    found: list[int] = []
    with moesaic.balance_losses() as losses:
        thread = threading.Thread(target=lambda: found.append(len(losses_of(layer, x))))
        thread.start()
        thread.join()
    assert losses == []
    assert found == [2]


def test_recomputed_forwards_count_once():
    plain, layer = naive.make(**BOTH), naive.make(**BOTH)
    x = naive.tokens(9, 6)
    expected = losses_of(plain, x)
    sum(expected).backward()
    with moesaic.balance_losses() as losses:
        y = checkpoint(layer, x, use_reentrant=False)
        # With the losses alone, and inside the context: recomputed forwards must not add to either.
        (sum(losses) + 0 * y.sum()).backward()
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert layer.router.load.tolist() == plain.router.load.tolist()
    torch.testing.assert_close(layer.router.weight.grad, plain.router.weight.grad)


# Counting the load, and the bias.


def test_load_adds_up_and_starts_again():
    model = nn.Sequential(naive.make(), nn.Identity(), naive.make(seed=3))
    for number in (5, 8):
        model(naive.tokens(number, 6))
    load = expert_load(model)
    assert list(load) == ["0.router", "2.router"]
    for counts in load.values():
        assert counts.dtype == torch.int64
        assert counts.sum() == 13 * 3
    x = naive.tokens(8, 6)
    reset_expert_load(model)
    assert not any(counts.any() for counts in expert_load(model).values())
    model(x)
    assert expert_load(model)["0.router"].tolist() == model[0].router(x).ids.flatten().bincount(minlength=8).tolist()


def test_load_is_reduced_over_processes():
    layer = naive.make()
    layer(naive.tokens(5, 6))
    mine = layer.router.load.clone()
    layer.router.reduce_counts = lambda counts: 2 * counts + 1
    assert torch.equal(expert_load(layer)["router"], 2 * mine + 1)
    assert torch.equal(layer.router.load, mine)


def test_a_step_of_the_bias():
    layer = naive.make(num_experts=4, bias_update_speed=0.5)
    layer.router.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    layer.router.load.copy_(torch.tensor([7, 1, 2, 2]))  # mean 3
    update_expert_bias(layer)
    # -0.5 to the one above the mean and 0.5 to the others, less their mean of 0.25.
    assert layer.router.bias.tolist() == [-0.75, 1.25, 2.25, 3.25]
    layer.router.load.fill_(3)
    update_expert_bias(layer)
    assert layer.router.bias.tolist() == [-0.75, 1.25, 2.25, 3.25]


def test_a_step_uses_the_load_of_all_processes():
    layer = naive.make(num_experts=2, top_k=1, bias_update_speed=0.5)
    layer.router.bias.zero_()
    layer.router.load.copy_(torch.tensor([3, 1]))
    layer.router.reduce_counts = lambda counts: counts + torch.tensor([0, 9])
    update_expert_bias(layer)
    assert layer.router.bias.tolist() == [0.5, -0.5]


def test_a_router_without_bias_is_left_alone():
    layer = naive.make()
    layer(naive.tokens(5, 6))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    update_expert_bias(layer)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert layer.router.bias is None


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_moves_towards_balance(score):
    router = naive.make(score=score, top_k=2, bias_update_speed=0.003).router
    router.bias.zero_()
    # Tokens that like two experts much more than the others.
    x = naive.tokens(256, 6) + router.weight[[1, 4]].detach().sum(0)

    def imbalance() -> float:
        reset_expert_load(router)
        router(x)
        return (router.load.max() / router.load.double().mean()).item()

    history = [imbalance()]
    for _ in range(200):
        update_expert_bias(router)
        history.append(imbalance())
    assert history[0] > 2
    assert max(history[-10:]) < 1.4
    assert router.bias.sum().abs() < 1e-4
