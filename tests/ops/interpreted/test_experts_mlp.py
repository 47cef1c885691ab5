"""``impl="triton"`` of experts_mlp: values and all gradients, on the launches of several GPUs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.ops import ACTIVATIONS, experts_mlp
from moesaic.ops.experts_mlp.activation import GATED_ONLY
from moesaic.ops.triton import available
from tests.ops.experts_oracle import Experts, any_experts, check, check_clamps, experts, run
from tests.ops.oracle import uninitialised_memory_is_nan

routing = available.load("routing")


@settings(max_examples=8)
@given(p=any_experts(available.DTYPES))
def test_values_and_gradients(p: Experts):
    with uninitialised_memory_is_nan():
        check(p, run("triton", p))


FORMS = [(a, gated) for a in ACTIVATIONS for gated in (True, False) if gated or a not in GATED_ONLY]


@pytest.mark.parametrize(("activation", "gated"), FORMS)
def test_activations(activation, gated):
    p = experts(20, 2, 3, 24, 40, torch.float32, gated=gated, biased=True, activation=activation)
    check(p, run("triton", p))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("activation", "gated"), FORMS)
def test_a_nan_stays_a_nan(activation, gated):
    p = experts(6, 2, 3, 8, 12, torch.float32, gated=gated, activation=activation)
    x = p.x.clone()
    x[2, 0] = torch.nan
    found = run("triton", replace(p, x=x))
    assert found["z"][2].isnan().all()
    assert not found["z"][[0, 1, 3, 4, 5]].isnan().any()
    assert found["weights"][2].isnan().any()


@pytest.mark.parametrize("dtype", available.DTYPES)
def test_clamps(dtype):
    check_clamps("triton", dtype)


@pytest.mark.parametrize("tokens", [5, 60, 150])
@pytest.mark.parametrize(
    ("capability", "strides"), [("8.0", "transposed"), ("9.0", "contiguous"), ("9.0", "transposed")]
)
def test_launches_of_gpus(on, capability, strides, tokens):
    # Few, some and many rows an expert: a configuration each. The sizes are aligned for descriptors.
    on(capability)
    p = experts(
        tokens, 2, 3, 72, 136, torch.bfloat16, strides=strides, biased=tokens == 60, weights_dtype=torch.float32
    )
    with uninitialised_memory_is_nan():
        check(p, run("triton", p))


def test_the_kernel_in_gluon_is_only_where_it_was_compiled_for(on, monkeypatch):
    # What it computes is not known without a GPU: nothing can interpret it.
    monkeypatch.setenv("MOESAIC_TRITON_WARPS", "1")
    on("10.0")
    p = experts(150, 2, 3, 64, 64, torch.bfloat16)
    check(p, run("triton", p))
    monkeypatch.setenv("MOESAIC_TRITON_WARPS", "on")
    with pytest.raises(ValueError, match="MOESAIC_TRITON_WARPS: got 'on'; set it to 1 to try the kernel"):
        run("triton", p)


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"activation": "gelu"}, False),
        ({"w3": None}, False),
        ({"dtype": torch.float16}, False),
        ({"D": 72}, False),
        ({"F": 60}, False),
        ({"transposed": True}, False),
        ({"capability": (10, 0)}, False),
    ],
    ids=str,
)
def test_what_the_kernel_in_gluon_takes(change, is_taken):
    from moesaic.ops.triton import device, warps

    given = {"activation": "silu", "dtype": torch.bfloat16, "D": 64, "F": 96, "capability": (9, 0)} | change
    x = torch.zeros(5, given["D"], dtype=given["dtype"])
    w1 = torch.zeros(2, given["D"], given["F"], dtype=given["dtype"])
    w1 = w1.mT.contiguous().mT if "transposed" in given else w1
    w3 = given.get("w3", w1)
    assert warps.takes(x, w1, w3, given["activation"], device.nvidia(given["capability"], 132)) == is_taken


@pytest.mark.parametrize("what", ["T", "D", "F"])
def test_nothing_of_something(what):
    sizes = {"T": 5, "K": 2, "E": 3, "D": 8, "F": 12} | {what: 0}
    p = experts(**sizes, dtype=torch.float32, biased=True)
    with uninitialised_memory_is_nan():
        check(p, run("triton", p))


@pytest.mark.parametrize("what", ["K", "E"])
def test_no_copies(what):
    sizes = {"T": 5, "K": 2, "E": 3, "D": 8, "F": 12} | {what: 0}
    p = experts(**sizes, dtype=torch.float32)
    with uninitialised_memory_is_nan():
        results = run("triton", p)
    assert not any(t.any() for t in results.values())


def test_blocks_are_problems_of_their_own():
    E, B, G = 5, 2, 3
    p = experts(4 * B, 2, E, 8, 12, torch.float32, biased=True)
    ids = torch.randint(-1, G + 1, (B, 4, 2), generator=torch.Generator().manual_seed(1))
    operands = (p.x.view(B, 4, 8), ids, p.weights.view(B, 4, 2), p.w1, p.w3, p.w2)
    ours, expected = (experts_mlp(*operands, b1=p.b1, b3=p.b3, b2=p.b2, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(ours, expected)


def test_only_wanted_gradients():
    p = experts(7, 2, 3, 8, 12, torch.float32, biased=True)
    everything = run("triton", p)
    for wanted in p.operands():
        operands = {name: t.detach().requires_grad_(name == wanted) for name, t in p.operands().items()}
        o = [operands[name] for name in ("x", "weights", "w1", "w3", "w2")]
        biases = {name: operands[name] for name in ("b1", "b3", "b2")}
        experts_mlp(o[0], p.ids, *o[1:], impl="triton", **biases).backward(p.grad)
        assert torch.equal(operands[wanted].grad, everything[wanted]), wanted


def test_without_gradients_the_same_bits():
    p = experts(9, 2, 3, 8, 12, torch.bfloat16)
    with torch.no_grad():
        z = experts_mlp(p.x, p.ids, p.weights, p.w1, p.w3, p.w2, impl="triton")
    assert torch.equal(z, run("triton", p)["z"])


@pytest.mark.parametrize("tokens", [9, 150])
@pytest.mark.parametrize("transposed", [False, True])
def test_main_grads_hold_what_is_not_rounded(on, tokens, transposed):
    on("9.0")
    p = experts(tokens, 2, 3, 72, 40, torch.bfloat16)
    expected = run("triton", p)
    leaf = {name: t.detach().requires_grad_() for name, t in p.operands().items()}
    into = tuple(torch.zeros(leaf[name].shape) for name in ("w1", "w3", "w2"))
    if transposed:
        into = tuple(t.mT.contiguous().mT for t in into)
    w = (leaf["w1"], leaf["w3"], leaf["w2"])
    experts_mlp(leaf["x"], p.ids, leaf["weights"], *w, impl="triton", main_grads=into).backward(p.grad)
    assert torch.equal(leaf["x"].grad, expected["x"])
    for name, t in zip(("w1", "w3", "w2"), into, strict=True):
        assert leaf[name].grad is None
        torch.testing.assert_close(t.bfloat16(), expected[name], rtol=2**-8, atol=2**-8)
        assert not torch.equal(t, t.bfloat16().float())
    once = [t.clone() for t in into]
    experts_mlp(p.x, p.ids, p.weights, *w, impl="triton", main_grads=into).backward(p.grad)
    for t, before in zip(into, once, strict=True):
        torch.testing.assert_close(t, 2 * before)


def test_same_bits_every_time():
    p = experts(40, 2, 4, 40, 48, torch.bfloat16, biased=True)
    first = run("triton", p)
    assert all(torch.equal(t, first[name]) for name, t in run("triton", p).items())


def test_stride_zero_gradient():
    p = experts(9, 2, 3, 8, 12, torch.float32)
    ones = replace(p, grad=torch.ones(1).expand(9, 8))
    check(ones, run("triton", ones))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_is(poison):
    p = experts(6, 2, 4, 8, 12, torch.float32)
    ids = torch.tensor([[0, 1], [1, 0], [2, -1], [2, 4], [0, 0], [1, 2]])
    p = replace(p, ids=ids, w1=p.w1.clone())
    clean = run("triton", p)
    p.w1[3] = poison  # idle
    assert all(torch.equal(t, clean[name]) for name, t in run("triton", p).items())
    x = p.x.clone()
    x[2] = poison
    z = run("triton", replace(p, x=x))["z"]
    assert z[2].isnan().any()
    assert torch.equal(z[[0, 1, 3, 4, 5]], clean["z"][[0, 1, 3, 4, 5]])


@settings(max_examples=20)
@given(ids=st.lists(st.lists(st.integers(-2, 5), min_size=3, max_size=3), max_size=12), num_experts=st.integers(0, 4))
def test_routing(ids, num_experts):
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 3)
    flat = ids_TK.flatten().tolist()
    routed = routing.route(ids_TK, num_experts)
    order = sorted(range(len(flat)), key=lambda s: flat[s] if 0 <= flat[s] < num_experts else num_experts)
    assert routed.slots.tolist() == order
    assert routed.tokens.tolist() == [s // 3 for s in order]
    expected = [order.index(s) if 0 <= flat[s] < num_experts else -1 for s in range(len(flat))]
    assert routed.positions.flatten().tolist() == expected
    here = [e for e in flat if 0 <= e < num_experts]
    bounds = [sum(e < g for e in here) for g in range(num_experts + 1)]
    assert routed.groups.bounds.tolist() == [[*bounds, len(flat)]]


def test_routing_of_several_blocks_of_slots(monkeypatch):
    monkeypatch.setattr(routing, "_BLOCK", 128)
    ids_TK = torch.randint(-2, 40, (150, 3), generator=torch.Generator().manual_seed(1))
    routed = routing.route(ids_TK, 37)
    keys, order = torch.where((ids_TK >= 0) & (ids_TK < 37), ids_TK, 37).flatten().sort(stable=True)
    assert routed.slots.tolist() == order.tolist()
    assert routed.groups.bounds[0].tolist() == torch.searchsorted(keys, torch.arange(39)).tolist()
