"""Adapters on a layer: what they compute, which one is active, and mistakes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic.layers import init_weights_
from moesaic.layers.lora import ExpertsAdapter, Rank, RouterAdapter, add_adapter

RANKS = {"w1": Rank(3, 0.5), "w3": Rank(3, 0.5), "w2": Rank(2, 2.0)}
X = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))


def adapted(names=("default",), **options):
    torch.manual_seed(0)
    moe = moesaic.MoE(moesaic.MoEConfig(dim=8, hidden_dim=12, num_experts=4, top_k=2))
    moe.requires_grad_(False)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name in names:
        add_adapter(moe.experts, name, ExpertsAdapter(moe.experts, RANKS, **options))
        add_adapter(moe.router, name, RouterAdapter(moe.router, Rank(2, 0.7), dropout=options.get("dropout", 0.0)))
    for name, parameter in moe.named_parameters():
        if "adapters" in name:
            nn.init.normal_(parameter, std=0.3)
    return moe


def merged(moe, name):
    """A layer without adapters that computes the same."""
    plain = moesaic.MoE(moe.config)
    state = moe.state_dict()
    adapter, router = moe.experts.adapters[name], moe.router.adapters[name]
    for weight, rank in RANKS.items():
        a, b = adapter.factors(weight)
        state[f"experts.{weight}"] = state[f"experts.{weight}"] + rank.scale * a.detach() @ b.detach()
    state["router.weight"] = state["router.weight"] + 0.7 * router.b.detach() @ router.a.detach()
    plain.load_state_dict({key: tensor for key, tensor in state.items() if "adapters" not in key})
    return plain


@pytest.mark.parametrize("share", [False, True])
def test_one_of_several_is_active(share):
    moe = adapted(("one", "two"), share=share)
    assert (moe.experts.active_adapter, moe.router.active_adapter) == ("two", "two")
    for name in ("two", "one"):
        moe.experts.active_adapter = moe.router.active_adapter = name
        torch.testing.assert_close(moe(X), merged(moe, name)(X))
    moe.experts.active_adapter = moe.router.active_adapter = None
    moe.experts.adapters = moe.router.adapters = None
    expected = moesaic.MoE(moe.config)
    expected.load_state_dict(moe.state_dict())
    torch.testing.assert_close(moe(X), expected(X))


def test_new_adapters_change_nothing():
    moe, expected = adapted(()), adapted(())(X)
    add_adapter(moe.experts, "new", ExpertsAdapter(moe.experts, {"w2": Rank(2, 1.0)}))
    add_adapter(moe.router, "new", RouterAdapter(moe.router, Rank(2, 1.0)))
    torch.testing.assert_close(moe(X), expected)
    assert moe.experts.adapters["new"].w2_a.abs().max() <= 12**-0.5
    assert moe.experts.adapters["new"].w1_a is None
    first = init_weights_(moe, seed=1).experts.adapters["new"].w2_a.clone()
    assert torch.equal(init_weights_(moe, seed=1).experts.adapters["new"].w2_a, first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """Dropout has the same masks when a layer is computed again."""
    moe = adapted(dropout=0.4)
    x = X.clone().requires_grad_()
    factors = [p for p in moe.parameters() if p.requires_grad]
    torch.manual_seed(1)
    moe(x).square().sum().backward()
    expected = [p.grad.clone() for p in (x, *factors)]
    for p in (x, *factors):
        p.grad = None
    torch.manual_seed(1)
    checkpoint(moe, x, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip((x, *factors), expected, strict=True))


def test_dropout():
    moe, plain = adapted(dropout=0.4), adapted()
    assert "dropout=0.4" in repr(moe.experts)
    assert "dropout=0.4" in repr(moe.router)
    torch.manual_seed(1)
    first, second = moe(X), moe(X)
    torch.manual_seed(1)
    assert torch.equal(moe(X), first)
    assert (first - second).norm() > 0.05 * first.norm()
    # Of sequences too, and of experts alone, which draw for themselves.
    assert moe(X.view(2, 5, 8)).shape == (2, 5, 8)
    args = X, torch.randint(4, (10, 2)), torch.rand(10, 2)
    assert (moe.experts(*args) - plain.experts(*args)).norm() > 0
    # On average it is what it is without, where that is linear: the output of w2's adapter.
    moe.experts.adapters["default"] = ExpertsAdapter(moe.experts, {"w2": Rank(2, 1.0)}, dropout=0.4)
    nn.init.normal_(moe.experts.adapters["default"].w2_b)
    mean = torch.stack([moe.experts(*args) for _ in range(100)]).mean(0)
    moe.eval()
    assert torch.equal(moe.experts(*args), moe.experts(*args))
    assert (mean - moe.experts(*args)).norm() < 0.2 * moe.experts(*args).norm()


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled():
    moe = adapted(dropout=0.4)
    compiled = torch.compile(moe, fullgraph=True)
    for length in (10, 7):
        torch.testing.assert_close(compiled.eval()(X[:length]), moe.eval()(X[:length]))
        assert compiled.train()(X[:length]).shape == (length, 8)


def test_mistakes():
    moe = adapted()
    for ranks, share, message in [
        ({}, False, r"ranks: got \[\]; give ranks for some of the weights"),
        ({"w4": Rank(2, 1.0)}, False, r"ranks: got \['w4'\]"),
        ({"w1": Rank(0, 1.0)}, False, "ranks: the rank of 'w1' must be at least 1, got 0"),
        ({"w1": Rank(2, 1.0)}, True, "share: w1 and w3 can share a factor if both have one rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            ExpertsAdapter(moe.experts, ranks, share=share)
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="dropout: must be a number, at least 0 and below 1"):
            ExpertsAdapter(moe.experts, RANKS, dropout=wrong)
    with pytest.raises(ValueError, match="r: must be at least 1, got 0"):
        RouterAdapter(moe.router, Rank(0, 1.0))
    adapter = ExpertsAdapter(moe.experts, RANKS)
    with pytest.raises(ValueError, match="name: there is an adapter 'default' already"):
        add_adapter(moe.experts, "default", adapter)
    with pytest.raises(ValueError, match=r"name: got 'a.b'; give a name without dots"):
        add_adapter(moe.experts, "a.b", adapter)
    moe.experts.main_grads = (None, None, torch.zeros(4, 12, 8))
    with pytest.raises(ValueError, match="main_grads: experts with adapters are frozen"):
        moe(X)
