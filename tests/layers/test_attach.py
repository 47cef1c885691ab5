"""Balance losses that ride on a layer's output, and forward passes that do not count."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic.layers import attach_balance_losses, uncounted
from tests.layers import naive
from tests.policies import WAYS, recomputed

OPTIONS = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01, "top_k": 2}
PASSES, LOSS_SCALE = 3, 65536.0


def main_loss(layer: nn.Module, x: Tensor) -> Tensor:
    return LOSS_SCALE * layer(x).square().sum() / PASSES


def grads_of(layer: moesaic.MoE, x: Tensor) -> list[Tensor]:
    return [x.grad, *(p.grad for p in layer.parameters())]


def by_hand(**options: object) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of several forward passes whose balance losses are added by hand, and those losses."""
    layer, x = naive.make(**OPTIONS, **options), naive.tokens(9, 6).requires_grad_()
    collected: list[Tensor] = []
    for part in x.split(3):
        with moesaic.balance_losses() as losses:
            main = main_loss(layer, part)
        (main + LOSS_SCALE * sum(losses) / PASSES).backward()
        collected += [loss.detach() for loss in losses]
    return grads_of(layer, x), collected


@pytest.mark.parametrize("kind", [float, partial(torch.tensor, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("way", [None, *WAYS])
def test_gradients_are_those_of_losses_added_by_hand(kind, way):
    expected, values = by_hand()
    layer, x = naive.make(**OPTIONS), naive.tokens(9, 6).requires_grad_()
    attach_balance_losses(layer, kind(LOSS_SCALE / PASSES))
    forward = layer if way is None else partial(recomputed, way, layer)
    with moesaic.balance_losses() as losses:
        for part in x.split(3):
            # Adding what is collected changes no gradient.
            (main_loss(forward, part) + sum(losses)).backward()
    torch.testing.assert_close(grads_of(layer, x), expected)
    assert torch.equal(torch.stack(losses), torch.stack(values))
    assert layer.router.load.sum() == 9 * 2


@pytest.mark.parametrize("options", [{"weigh_inputs": True}, {"aux_loss": "sequence"}], ids=str)
def test_every_loss_of_every_layer_is_carried(options):
    expected, _ = by_hand(**options)
    layer, x = naive.make(**OPTIONS, **options), naive.tokens(9, 6).requires_grad_()
    attach_balance_losses(layer, LOSS_SCALE / PASSES)
    for part in x.split(3):
        main_loss(layer, part).backward()
    torch.testing.assert_close(grads_of(layer, x), expected)


def test_a_tensor_is_read_by_each_backward_pass():
    layer, x, scale = naive.make(**OPTIONS), naive.tokens(9, 6), torch.tensor(1.0)
    attach_balance_losses(layer, scale)
    grads = []
    for _ in range(2):
        y = layer(x)
        scale.mul_(4)
        [grad] = torch.autograd.grad(y, layer.router.weight, torch.zeros_like(y))
        grads.append(grad)
    torch.testing.assert_close(grads[1], 4 * grads[0])


def test_only_in_training_and_only_until_taken_off():
    layer, x = naive.make(**OPTIONS), naive.tokens(9, 6)
    attach_balance_losses(layer, 1.0)

    def grad() -> float:
        y = layer(x)
        return torch.autograd.grad(y, layer.router.weight, torch.zeros_like(y))[0].norm().item()

    assert grad() > 0
    with torch.no_grad():
        layer(x)  # nothing to attach, and no error
    layer.eval()
    assert grad() == 0
    layer.train()
    attach_balance_losses(layer, None)
    assert grad() == 0
    with moesaic.balance_losses() as losses:
        layer(x)
    assert all(loss.requires_grad for loss in losses)


@pytest.mark.parametrize(
    ("scale", "text"), [(-1.0, "got -1.0"), (float("nan"), "got nan"), (torch.ones(2), r"got shape \[2\]")]
)
def test_a_scale_that_is_none(scale, text):
    with pytest.raises(ValueError, match=f"scale: expected a .*{text}"):
        attach_balance_losses(naive.make(), scale)


def test_uncounted_passes_leave_no_trace():
    layer, x = naive.make(**OPTIONS), naive.tokens(9, 6).requires_grad_()
    y = layer(x)
    counted = layer.router.load.clone()
    with moesaic.balance_losses() as losses:
        with uncounted():
            same = layer(x)
            with torch.no_grad():  # an error where losses are collected
                layer(x)
            checkpoint(layer, x, use_reentrant=True)
        assert losses == []
        same.sum().backward()
        assert torch.equal(layer.router.load, counted)
        layer(x)
    assert torch.equal(same, y)
    assert len(losses) == 2
    assert torch.equal(layer.router.load, 2 * counted)


def test_compiled_code_asks_each_time(forked_python):
    forked_python("""
import torch, moesaic
from moesaic.layers import attach_balance_losses, uncounted

layer = moesaic.MoE(moesaic.MoEConfig(dim=8, hidden_dim=8, num_experts=4, top_k=2, aux_loss_coef=0.1))
attach_balance_losses(layer, 3.0)
x = torch.randn(5, 8)
layer(x).sum().backward()
expected = layer.router.weight.grad.clone()
layer.zero_grad()
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
compiled(x).sum().backward()
torch.testing.assert_close(layer.router.weight.grad, expected)
with uncounted():
    compiled(x)
assert layer.router.load.sum() == 2 * 5 * 2
""")
