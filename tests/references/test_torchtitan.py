"""Our layer in one process against torchtitan's with the same sizes, weights and tokens, in fp32.

torchtitan rounds what goes into its experts to bf16, whatever the dtype of the model. That rounding is taken out here,
so that everything else can be compared within the rounding errors of fp32.

``make test-references`` installs torchtitan and runs this.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import moesaic
from tests.distributed.parity import assert_close

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed; `make test-references` does", allow_module_level=True)

SIZES = {"dim": 32, "hidden_dim": 48, "num_experts": 8, "top_k": 3}
CONFIGS = {
    "softmax": moesaic.MoEConfig(**SIZES),
    "softmax, as it is": moesaic.MoEConfig(**SIZES, normalize_top_k=False),
    "sigmoid, bias, shared": moesaic.MoEConfig(
        **SIZES, score="sigmoid", score_bias=True, route_scale=2.5, shared_hidden_dim=40
    ),
    "groups": moesaic.MoEConfig(**SIZES, score="sigmoid", num_groups=4, top_groups=2),
}
# Theirs are [out, in], expert by expert.
NAMES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "router.weight": ("router.gate.weight", lambda t: t),
    "experts.w1": ("routed_experts.inner_experts.w1_EFD", lambda t: t.mT),
    "experts.w3": ("routed_experts.inner_experts.w3_EFD", lambda t: t.mT),
    "experts.w2": ("routed_experts.inner_experts.w2_EDF", lambda t: t.mT),
    **{f"shared.{w}.weight": (f"shared_experts.{w}.weight", lambda t: t) for w in ("w1", "w3", "w2")},
}


@pytest.mark.parametrize("routing", CONFIGS)
def test_layer_equals_that_of_torchtitan(routing):
    ours = make_moe(CONFIGS[routing])
    theirs = make_torchtitan(ours)
    x, target = torch.randn(2, 3, 10, SIZES["dim"]).unbind()
    with mock.patch.object(Tensor, "bfloat16", lambda t: t), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autocast.*")  # fp32 is no autocast of the CPU's: it does nothing
        expected, expected_input_grad = run(theirs, x, target)
    output, input_grad = run(ours, x, target)

    assert_close("output", output, expected)
    assert_close("input gradient", input_grad, expected_input_grad)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert {NAMES[name][0] for name, _ in ours.named_parameters()} == grads.keys()
    for name, parameter in ours.named_parameters():
        their_name, layout = NAMES[name]
        assert_close(f"gradient of {name}", layout(parameter.grad), grads[their_name])


def run(layer: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y - target).square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def make_moe(config: moesaic.MoEConfig) -> moesaic.MoE:
    torch.manual_seed(0)
    moe = moesaic.MoE(config)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.2)
    if moe.router.bias is not None:
        nn.init.normal_(moe.router.bias, std=0.3)
        moe.router.bias[3] = -9.0  # an idle expert
    return moe


def make_torchtitan(moe: moesaic.MoE) -> Any:
    """torchtitan's layer with the weights of ``moe``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchtitan.models.common.feed_forward import FeedForward
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.moe import GroupedExperts as Experts
        from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
        from torchtitan.models.common.moe import RoutedExperts as Routed
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher as Dispatcher

    c = moe.config
    wide = Linear.Config(in_features=c.dim, out_features=c.shared_hidden_dim)
    narrow = Linear.Config(in_features=c.shared_hidden_dim, out_features=c.dim)
    config = MoE.Config(
        num_experts=c.num_experts,
        routed_experts=Routed.Config(
            inner_experts=Experts.Config(dim=c.dim, hidden_dim=c.hidden_dim, num_experts=c.num_experts),
            token_dispatcher=Dispatcher.Config(num_experts=c.num_experts, top_k=c.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=c.num_experts,
            gate=Linear.Config(in_features=c.dim, out_features=c.num_experts),
            num_expert_groups=c.num_groups if c.num_groups > 1 else None,
            num_limited_groups=c.top_groups if c.num_groups > 1 else None,
            top_k=c.top_k,
            score_func=c.score,
            route_norm=c.normalize_top_k,
            route_scale=c.route_scale,
        ),
        load_balance_coeff=1e-3 if c.score_bias else None,
        shared_experts=FeedForward.Config(w1=wide, w3=wide, w2=narrow) if c.shared_hidden_dim else None,
    )
    layer = config.build()
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            their_name, layout = NAMES[name]
            parameters[their_name].copy_(layout(parameter))
        if moe.router.bias is not None:
            layer.expert_bias_E.copy_(moe.router.bias)
    return layer
