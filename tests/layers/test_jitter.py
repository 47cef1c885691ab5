"""Noise on tokens in training."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moesaic

CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2, shared_hidden_dim=4)


def make(**changes: float) -> moesaic.MoE:
    torch.manual_seed(0)
    moe = moesaic.MoE(replace(CONFIG, **changes))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe


def noise(x: torch.Tensor, size: float) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.empty_like(x).uniform_(1 - size, 1 + size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_jitter_is_on_all_that_the_layer_sees(dtype):
    x = torch.randn(5, 8, dtype=dtype)
    expected = make().to(dtype)(x * noise(x, 0.3))
    moe = make(input_jitter=0.3).to(dtype)
    torch.manual_seed(1)
    assert torch.equal(moe(x), expected)


def test_router_jitter_is_on_the_router_alone():
    x = torch.randn(5, 8)
    moe, calm = make(router_jitter=0.3), make()
    routing = calm.router(x * noise(x, 0.3))
    torch.manual_seed(1)
    y = moe(x)
    expected = calm.experts(x.unsqueeze(0), routing.ids.unsqueeze(0), routing.weights.unsqueeze(0))[0] + calm.shared(x)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, calm(x))


@pytest.mark.parametrize("name", ["input_jitter", "router_jitter"])
def test_evaluation_is_calm_and_recomputation_draws_the_same(name):
    x = torch.randn(5, 8, requires_grad=True)
    moe = make(**{name: 0.3})
    torch.manual_seed(1)
    y = moe(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    torch.manual_seed(1)
    (actual,) = torch.autograd.grad(checkpoint(moe, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(actual, expected)
    assert not torch.equal(moe(x), y)
    assert torch.equal(moe.eval()(x), make().eval()(x))


def test_padding_stays_padding():
    x = torch.randn(4, 8)
    x[2] = torch.nan
    mask = torch.tensor([True, True, False, True])
    y = make(input_jitter=0.3, router_jitter=0.3)(x, mask)
    assert y.isfinite().all()
    assert not y[2].any()


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("name", ["input_jitter", "router_jitter"])
def test_sizes_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name}: must be at least 0 and less than 1, got {value}"):
        replace(CONFIG, **{name: value})
