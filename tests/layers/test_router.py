"""The router against plain Python: scores, choice, weights, their dtype, and configurations it refuses."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import moesaic
from moesaic.layers import Routing
from moesaic.ops import ACTIVATIONS
from tests.layers import naive


def router(dtype: torch.dtype = torch.float64, **options) -> moesaic.TopKRouter:
    return naive.make(dtype, **options).router


def check(layer: moesaic.TopKRouter, x: torch.Tensor, routing: Routing) -> None:
    """Ids to the letter, weights to rounding; everything from the layer's own logits."""
    config = layer.config
    assert routing.ids.dtype == torch.int64
    assert routing.ids.shape == routing.weights.shape == (x.shape[0], config.top_k)
    logits = x.double() @ layer.weight.double().T
    scores = logits.softmax(1) if config.score == "softmax" else logits.sigmoid()
    bias = [0.0] * config.num_experts if layer.bias is None else layer.bias.tolist()
    for ids, weights, row in zip(routing.ids.tolist(), routing.weights.tolist(), scores.tolist(), strict=True):
        expected = naive.choose(config, row, bias)
        assert ids == expected
        chosen = [row[e] for e in expected]
        total = sum(chosen) if config.normalize_top_k else 1
        assert weights == pytest.approx([config.route_scale * s / total for s in chosen], rel=1e-5)


@given(
    score=st.sampled_from(["softmax", "sigmoid"]),
    normalize_top_k=st.booleans(),
    route_scale=st.sampled_from([1.0, 2.5]),
    bias=st.booleans(),
    groups=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 2), (6, 3), (12, 5)]),
    group_best=st.integers(1, 3),
    top_k=st.integers(1, 5),
    num_tokens=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_routing(score, normalize_top_k, route_scale, bias, groups, group_best, top_k, num_tokens, seed):
    num_groups, top_groups = groups
    layer = router(
        seed=seed,
        num_experts=12,
        top_k=top_k,
        score=score,
        normalize_top_k=normalize_top_k,
        route_scale=route_scale,
        score_bias=bias,
        num_groups=num_groups,
        top_groups=top_groups,
        group_best=group_best,
    )
    x = naive.tokens(num_tokens, 6, seed=seed)
    check(layer, x, layer(x))


def test_only_the_best_groups():
    # The best expert of all is in a group whose two best are worse than others' two best.
    layer = router(num_experts=6, dim=6, top_k=2, score="sigmoid", num_groups=3, top_groups=1)
    layer.weight.data = torch.eye(6, dtype=torch.float64)
    x = torch.tensor([[3.0, -3.0, 1.0, 1.1, 0.0, 0.5]], dtype=torch.float64)
    assert layer(x).ids.tolist() == [[3, 2]]


def test_a_group_stays_out_whatever_the_signs():
    # Biased scores may all be negative: what is left out is not to win with a zero.
    layer = router(num_experts=4, dim=4, top_k=2, score="sigmoid", num_groups=2, top_groups=1, bias_update_speed=0.1)
    layer.weight.data = torch.eye(4, dtype=torch.float64)
    layer.bias.copy_(torch.tensor([-5.0, -5.0, -9.0, -9.0]))
    assert layer(torch.zeros(1, 4, dtype=torch.float64)).ids.sort().values.tolist() == [[0, 1]]


def test_one_expert_a_group():
    layer = router(num_experts=8, num_groups=8, top_groups=3, top_k=3)
    plain = router(num_experts=8, top_k=3)
    x = naive.tokens(20, 6)
    assert torch.equal(layer(x).ids, plain(x).ids)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_changes_the_choice_and_not_the_weights(score):
    layer = router(score=score, bias_update_speed=0.01, normalize_top_k=False)
    x = naive.tokens(30, 6)
    layer.bias.zero_()
    before = layer(x)
    layer.bias[3] = 5
    after = layer(x)
    assert (after.ids == 3).any(1).all()
    assert not (before.ids == 3).any(1).all()
    logits = x @ layer.weight.T
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    torch.testing.assert_close(after.weights, scores.gather(1, after.ids))
    # An equal bias for all changes nothing.
    layer.bias.fill_(7)
    assert torch.equal(layer(x).weights, before.weights)


def test_bias_has_no_gradient():
    layer = router(bias_update_speed=0.01)
    assert dict(layer.named_parameters()).keys() == {"weight"}
    assert not layer.bias.requires_grad
    assert "bias" in layer.state_dict()
    assert "load" not in layer.state_dict()
    assert router().bias is None


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_choose_distinct_experts_and_always_the_same(score):
    layer = router(score=score)
    layer.weight.data.zero_()
    routing = layer(naive.tokens(50, 6))
    assert all(len(set(ids)) == 3 for ids in routing.ids.tolist())
    torch.testing.assert_close(routing.weights, torch.full_like(routing.weights, 1 / 3))
    assert torch.equal(layer(naive.tokens(50, 6)).ids, routing.ids)
    # Every token sees the same tie.
    assert torch.equal(routing.ids, routing.ids[:1].expand(50, 3))


def test_scores_that_vanish():
    # Sigmoid scores may all underflow; the weights stay finite, and so do their gradients.
    layer = router(torch.float32, score="sigmoid")
    layer.weight.data.fill_(-100)
    x = torch.full((2, 6), 10.0, requires_grad=True)
    weights = layer(x).weights
    weights.sum().backward()
    assert weights.isfinite().all()
    assert x.grad.isfinite().all()


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_of_half_precision_input_is_fp32(dtype):
    layer = router(dtype)
    x = naive.tokens(40, 6, dtype=dtype)
    routing = layer(x)
    assert routing.weights.dtype == torch.float32
    exact = copy.deepcopy(layer).float()(x.float())
    assert torch.equal(routing.ids, exact.ids)
    assert torch.equal(routing.weights, exact.weights)
    routing.weights[:, 0].sum().backward()
    assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_under_autocast(dtype):
    layer = router(dtype)
    x = naive.tokens(40, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer(x)
    assert routing.weights.dtype == dtype
    assert torch.equal(routing.weights, layer(x).weights)
    assert torch.equal(routing.ids, layer(x).ids)


def test_mixed_input_and_weight():
    # Under FSDP's mixed precision the input may be bf16 and the weight fp32.
    layer, x = router(torch.float32), naive.tokens(9, 6, dtype=torch.bfloat16)
    logits = F.linear(x.float(), layer.weight)
    assert torch.equal(layer(x).ids, logits.topk(3, 1).indices)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_bias_and_load_keep_their_dtype(cast):
    layer = router(torch.float32, bias_update_speed=0.001)
    layer.bias.fill_(1 + 1e-3)  # not a bf16
    getattr(layer, cast)()
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, torch.full((8,), 1 + 1e-3))
    assert layer.load.dtype == torch.int64


def test_gradients_of_weights():
    layer = router(normalize_top_k=True, route_scale=1.5)
    x = naive.tokens(5, 6).requires_grad_()

    def weights(x, w):
        return torch.func.functional_call(layer, {"weight": w}, (x,)).weights

    assert torch.autograd.gradcheck(weights, (x, layer.weight.detach().clone().requires_grad_()))


# Configuration.


def config(**options) -> moesaic.MoEConfig:
    return moesaic.MoEConfig(**{"dim": 4, "hidden_dim": 8, "num_experts": 6, "top_k": 2} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: must be at least 1, got 0"),
        ({"hidden_dim": -3}, "hidden_dim: must be at least 1, got -3"),
        ({"num_experts": 0}, "num_experts: must be at least 1, got 0"),
        ({"top_k": 0}, "top_k: must be at least 1, got 0"),
        ({"num_groups": 0}, "num_groups: must be at least 1, got 0"),
        ({"top_groups": 0}, "top_groups: must be at least 1, got 0"),
        ({"group_best": 0}, "group_best: must be at least 1, got 0"),
        ({"shared_gate": True}, "shared_gate: there is no shared expert to have it; set shared_hidden_dim"),
        (
            {"shared_activation": "gelu"},
            "shared_activation: there is no shared expert to have it; set shared_hidden_dim",
        ),
        ({"aux_loss_coef": -0.5}, "aux_loss_coef: must be at least 0, got -0.5"),
        ({"z_loss_coef": -1e-3}, "z_loss_coef: must be at least 0, got -0.001"),
        ({"bias_update_speed": -1.0}, "bias_update_speed: must be at least 0, got -1.0"),
        ({"shared_hidden_dim": -1}, "shared_hidden_dim: must be at least 0, got -1"),
        ({"score": "tanh"}, r"score: got 'tanh'; choose one of ('softmax', 'sigmoid')"),
        ({"aux_loss": "token"}, r"aux_loss: got 'token'; choose one of ('batch', 'sequence')"),
        ({"activation": "elu"}, f"activation: got 'elu'; choose one of {ACTIVATIONS}"),
        ({"num_groups": 4}, r"num_groups: 4 does not divide num_experts (6)"),
        ({"num_groups": 2, "top_groups": 3}, r"top_groups: 3 is more than num_groups (2)"),
        ({"top_k": 7}, "top_k: 7 is more than the 6 experts a token can choose from"),
        (
            {"top_k": 5, "num_groups": 3, "top_groups": 2},
            "top_k: 5 is more than the 4 experts a token can choose from",
        ),
    ],
)
def test_configurations_that_cannot_be(unchecked, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the whole message is compared
        config(**options)
    assert str(caught.value) == message


def test_configuration_is_a_value():
    assert config() == config()
    assert hash(config()) == hash(config())
    assert dataclasses.replace(config(), top_k=3).top_k == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().top_k = 3
    with pytest.raises(ValueError, match="top_k: 9"):
        dataclasses.replace(config(), top_k=9)


def test_the_gate_of_half_precision_input_keeps_no_wide_copy_of_it():
    router = moesaic.TopKRouter(moesaic.MoEConfig(dim=64, hidden_dim=8, num_experts=4, top_k=2), dtype=torch.bfloat16)
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weights = router(x).weights
    assert all(t.dtype == torch.bfloat16 for t in saved if t.numel() >= x.numel())

    # The gradients are those of the fp32 product.
    upstream = torch.randn_like(weights)
    ours = torch.autograd.grad(weights, [x, router.weight], upstream)
    wide_x, wide = x.detach().float().requires_grad_(), moesaic.TopKRouter(router.config)
    wide.weight.data = router.weight.detach().float()
    expected = torch.autograd.grad(wide(wide_x).weights, [wide_x, wide.weight], upstream)
    for mine, exact in zip(ours, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, exact.bfloat16())
