"""The layer against a naive loop over tokens, and everything one does with a module."""

import copy

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.layers import expert_load
from tests.layers import naive

VARIANTS = {
    "plain": {},
    "top-1": {"top_k": 1, "normalize_top_k": False},
    "every expert": {"top_k": 8},
    "shared expert": {"shared_hidden_dim": 7},
    "gelu": {"activation": "gelu", "shared_hidden_dim": 4},
    "clamped": {"activation": "clamped_swiglu", "shared_hidden_dim": 4},
    "raw weights, scaled": {"normalize_top_k": False, "route_scale": 2.5},
    "sigmoid, bias": {"score": "sigmoid", "bias_update_speed": 0.01, "route_scale": 1.5},
    "groups": {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "bias_update_speed": 0.01},
    "groups by their best": {"num_groups": 4, "top_groups": 2, "group_best": 1, "score_bias": True},
    "gated shared expert": {"shared_hidden_dim": 7, "shared_gate": True},
    "biases": {"logit_bias": True, "expert_biases": True},
    "weighed inputs": {"weigh_inputs": True, "score": "sigmoid", "normalize_top_k": False},
}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Relative in the norm of each."""
    assert ours.keys() == theirs.keys()
    for name, truth in theirs.items():
        assert ours[name].shape == truth.shape, name
        error = (ours[name].double() - truth).norm() / truth.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.3g}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(11,), (2, 5), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_and_gradients(variant, shape, dtype):
    layer = naive.make(dtype, **VARIANTS[variant])
    exact = naive.in_fp64(layer)
    x = naive.tokens(*shape, 6, dtype=dtype).requires_grad_()
    grad = naive.tokens(*shape, 6, seed=2)
    y = layer(x)
    x_exact = x.detach().double().requires_grad_()
    y_exact = naive.moe(exact, x_exact)
    assert y.dtype == dtype
    assert y.shape == x.shape
    ours = {"y": y.detach()} | naive.gradients(layer, x, y, grad.to(dtype))
    theirs = {"y": y_exact.detach()} | naive.gradients(exact, x_exact, y_exact, grad)
    assert_same(ours, theirs, 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_implementation(impl):
    layer = naive.make()
    x = naive.tokens(9, 6)
    named = moesaic.MoE(layer.config, impl=impl, dtype=torch.float64)
    named.load_state_dict(layer.state_dict())
    assert_same({"y": named(x)}, {"y": naive.moe(layer, x)}, 1e-12)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6)], ids=str)
@pytest.mark.parametrize("variant", ["shared expert", "groups"])
def test_no_tokens(variant, shape):
    layer = naive.make(**VARIANTS[variant], aux_loss_coef=0.1, z_loss_coef=0.1)
    x = naive.tokens(*shape).requires_grad_()
    with moesaic.balance_losses() as losses:
        y = layer(x)
    (y.sum() + sum(losses)).backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert [loss.item() for loss in losses] == [0, 0]
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert not layer.router.load.any()


def test_idle_experts_get_no_gradient():
    layer = naive.make(bias_update_speed=0.01)
    layer.router.bias.zero_()
    layer.router.bias[[2, 5]] = -9
    layer(naive.tokens(20, 6)).sum().backward()
    assert layer.router.load[[2, 5]].tolist() == [0, 0]
    for weight in (layer.experts.w1, layer.experts.w3, layer.experts.w2):
        assert not weight.grad[[2, 5]].any()
        assert weight.grad[[0, 1, 3, 4, 6, 7]].any()


def test_batches_do_not_matter():
    # No capacity, no dropping: what other tokens are there does not change a token's result by a bit.
    layer = naive.make(torch.float32, shared_hidden_dim=4)
    x = naive.tokens(12, 6, dtype=torch.float32)
    whole = layer(x)
    parts = torch.cat([layer(part) for part in x.split([1, 4, 7])])
    assert_same({"y": parts}, {"y": whole.double()}, 1e-6)


def test_views_and_strides():
    layer = naive.make()
    x = naive.tokens(3, 4, 12)[..., ::2].transpose(0, 1)
    assert_same({"y": layer(x)}, {"y": naive.moe(layer, x)}, 1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (6,), (2, 3, 7), (2, 6, 1)], ids=str)
def test_wrong_shapes(unchecked, shape):
    layer = naive.make()
    with pytest.raises(ValueError, match=r"x: expected \[tokens, 6\] or \[\.\.\., 6\], got \["):
        layer(naive.tokens(*shape))


# Mixed precision.


def test_autocast():
    layer = naive.make(torch.float32, shared_hidden_dim=8, score="sigmoid")
    x = naive.tokens(64, 6, dtype=torch.float32)
    seen = {}
    layer.router.register_forward_hook(lambda module, args, routing: seen.update(routing=routing))
    expected = layer(x)
    exact_routing = seen["routing"]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    # The gate is in fp32: the same experts and the same weights, to the bit. The experts are in bf16.
    assert torch.equal(seen["routing"].ids, exact_routing.ids)
    assert torch.equal(seen["routing"].weights, exact_routing.weights)
    assert seen["routing"].weights.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    error = (y - expected).norm() / expected.norm()
    assert 1e-4 < error < 2e-2
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_half_precision_weights():
    layer = naive.make(torch.bfloat16, shared_hidden_dim=8)
    x = naive.tokens(64, 6, dtype=torch.bfloat16)
    y = layer(x)
    exact = naive.moe(naive.in_fp64(layer), x.double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() / exact.norm() < 2e-2


# Compilation, in an interpreter without run-time checks.

COMPILE = """
import torch
from tests.layers import naive
import moesaic

torch.manual_seed(0)
for options in ({options}):
    torch._dynamo.reset()
    layer = naive.make(torch.float32, **options).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((5, 6), (2, 9, 6), (3, 9, 6)):
        x = naive.tokens(*shape, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x), layer(x))
    x = naive.tokens(5, 6, dtype=torch.float32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).square().sum().backward()
    layer(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
# In training mode too, where tokens are counted: once, also where the forward is run again.
layer = naive.make(torch.float32)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
x = naive.tokens(5, 6, dtype=torch.float32).requires_grad_()
compiled(x).sum().backward()
assert layer.router.load.sum() == 5 * 3, layer.router.load
torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False).sum().backward()
assert layer.router.load.sum() == 2 * 5 * 3, layer.router.load
print("compiled")
"""


def test_compile(forked_python):
    options = [VARIANTS[name] for name in ("shared expert", "groups")]
    said = forked_python(COMPILE.replace("({options})", repr(options)))
    assert said.stdout.endswith("compiled\n")


# What one does with a module.


def test_state_dict_round_trip():
    layer = naive.make(shared_hidden_dim=4, bias_update_speed=0.01)
    layer(naive.tokens(9, 6))
    state = layer.state_dict()
    assert sorted(state) == [
        "experts.w1",
        "experts.w2",
        "experts.w3",
        "router.bias",
        "router.weight",
        "shared.w1.weight",
        "shared.w2.weight",
        "shared.w3.weight",
    ]
    other = naive.make(shared_hidden_dim=4, bias_update_speed=0.01, seed=5)
    assert other.load_state_dict(state) == ([], [])
    x = naive.tokens(9, 6)
    assert torch.equal(other(x), layer(x))
    # The load belongs to a run and not to the weights.
    assert other.router.load.sum() == 9 * 3


def test_deepcopy():
    layer = naive.make(shared_hidden_dim=4, bias_update_speed=0.01)
    twin = copy.deepcopy(layer)
    x = naive.tokens(9, 6)
    before = layer(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
        twin.router.bias.add_(torch.arange(8.0))
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)
    assert twin.router.load.sum() == layer.router.load.sum() / 2
    assert twin.dispatcher is not layer.dispatcher


def test_meta_device():
    config = naive.make(bias_update_speed=0.01, shared_hidden_dim=4).config
    layer = moesaic.MoE(config, device="meta")
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    assert layer(torch.empty(4, 6, device="meta")).shape == (4, 6)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                t.data.fill_(99)
            module.reset_parameters()
    assert all(p.abs().max() < 1 for p in layer.parameters())
    # Buffers too: they are as uninitialised as the parameters were.
    assert not layer.router.load.any()
    assert not layer.router.bias.any()


def test_frozen_parts():
    layer = naive.make(shared_hidden_dim=4)
    layer.experts.requires_grad_(False)
    layer.shared.requires_grad_(False)
    layer(naive.tokens(9, 6)).sum().backward()
    assert layer.router.weight.grad.any()
    assert layer.experts.w1.grad is None
    layer.requires_grad_(False)
    assert not layer(naive.tokens(9, 6)).requires_grad


def test_eval_mode_counts_nothing():
    layer = naive.make(aux_loss_coef=0.1).eval()
    with moesaic.balance_losses() as losses:
        layer(naive.tokens(9, 6))
    assert losses == []
    assert not expert_load(layer)["router"].any()


def test_names_of_its_parts():
    layer = naive.make(torch.float32)
    assert "num_experts=8, dim=6, hidden_dim=5" in repr(layer)
    assert "dim=6, num_experts=8, top_k=3, score=softmax" in repr(layer)


def test_fresh_parameters_are_small():
    torch.manual_seed(0)
    layer = moesaic.MoE(moesaic.MoEConfig(dim=64, hidden_dim=64, num_experts=8, top_k=2, shared_hidden_dim=64))
    for parameter in (layer.router.weight, layer.experts.w1, layer.experts.w3, layer.experts.w2):
        assert abs(parameter.std().item() - 0.02) < 0.002
    assert not any(p.isnan().any() for p in layer.parameters())
