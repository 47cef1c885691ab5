"""Activation checkpointing, with every policy: gradients, loads and losses are those without it."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moesaic
from tests.layers import naive
from tests.policies import WAYS, recomputed

LOSSES = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}
Wrapped = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def called(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def run(layer: moesaic.MoE, wrap: Wrapped, scale: float = 3.0) -> list[Tensor]:
    """Everything that two pending forwards give: results, losses, gradients, loads. The layer runs twice in each."""
    layer = copy.deepcopy(layer)
    inputs = [naive.tokens(n, 6, seed=n).requires_grad_() for n in (9, 5)]
    with moesaic.balance_losses() as losses:
        outputs = [wrap(lambda x: layer(layer(x.sin())).cos(), x) for x in inputs]
        total = sum(y.square().sum() for y in outputs) + sum(n * loss for n, loss in enumerate(losses))
        (scale * total).backward()
    values = [y.detach() for y in outputs] + [loss.detach() for loss in losses]
    return [*values, *[t.grad for t in (*inputs, *layer.parameters())], layer.router.load]


@functools.cache
def layer_and_truth(case: str) -> tuple[moesaic.MoE, list[Tensor]]:
    options = {
        "groups and biases": {"num_groups": 2, "top_groups": 1, "bias_update_speed": 0.1, "logit_bias": True},
        "losses": {**LOSSES, "shared_hidden_dim": 4, "shared_gate": True},
        "weighed inputs": {**LOSSES, "weigh_inputs": True, "expert_biases": True},
    }[case]
    layer = naive.make(**options)
    return layer, run(layer, called)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["groups and biases", "losses", "weighed inputs"])
def test_a_checkpoint_changes_no_number(case, way):
    layer, expected = layer_and_truth(case)
    torch.testing.assert_close(run(layer, functools.partial(recomputed, way)), expected)


# torch's own advice, which is beside the point where an outer checkpoint runs the function first.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("inner", ["reentrant", "plain", "save all"])
@pytest.mark.parametrize("outer", ["reentrant", "plain"])
def test_checkpoints_in_checkpoints(outer, inner):
    layer, expected = layer_and_truth("losses")

    def wrap(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return recomputed(outer, lambda x: recomputed(inner, function, 1 * x), x)

    torch.testing.assert_close(run(layer, wrap), expected)


@pytest.mark.parametrize("way", ["reentrant", "plain"])
def test_a_loss_that_the_function_itself_gives_back(way):
    def function(layer: moesaic.MoE, x: Tensor) -> Tensor:
        with moesaic.balance_losses() as losses:
            y = layer(x)
        return y.sum() + torch.stack(losses).sum()

    plain = naive.make(**LOSSES)
    layer = copy.deepcopy(plain)
    x = naive.tokens(9, 6).requires_grad_()
    function(plain, x).backward()
    recomputed(way, functools.partial(function, layer), x).backward()
    torch.testing.assert_close(layer.router.weight.grad, plain.router.weight.grad)


def test_several_backward_passes_of_one_reentrant_checkpoint():
    layer = naive.make(**LOSSES)
    x = naive.tokens(9, 6).requires_grad_()
    with moesaic.balance_losses() as losses:
        total = recomputed("reentrant", layer, x).sum() + sum(losses)
    total.backward(retain_graph=True)
    once = layer.router.weight.grad.clone()
    (2 * total).backward()
    torch.testing.assert_close(layer.router.weight.grad, 3 * once)
    assert layer.router.load.sum() == 9 * 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("together", [True, False], ids=["no input with a gradient", "one after the other"])
def test_a_loss_whose_gradient_cannot_reach_the_router(together):
    layer = naive.make(**LOSSES)
    x = naive.tokens(9, 6).requires_grad_(not together)
    with moesaic.balance_losses() as losses:
        y = recomputed("reentrant", layer, x * 1 if not together else x)
    if not together:
        y.sum().backward()
    with pytest.raises(RuntimeError, match="balance_losses: the gradient of a balance loss did not reach its router"):
        (y.sum() + sum(losses) if together else sum(losses)).backward()


def test_a_loss_without_gradients():
    layer, x = naive.make(**LOSSES), naive.tokens(9, 6)
    with moesaic.balance_losses() as expected:
        layer(x)
    with torch.no_grad(), moesaic.balance_losses() as losses:
        layer(x)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert not losses[0].requires_grad
    with moesaic.balance_losses(), torch.no_grad(), pytest.raises(RuntimeError, match="ran without gradients"):
        layer(x)
    with moesaic.balance_losses() as losses:
        layer.eval()(x)
    assert losses == []
