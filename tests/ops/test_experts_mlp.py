"""experts_mlp against the loop over experts: values and all gradients, of every implementation."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moesaic
from moesaic.ops import ACTIVATIONS, experts_mlp
from moesaic.ops.experts_mlp.activation import GATED_ONLY
from moesaic.ops.experts_mlp.implementations import IMPLEMENTATIONS
from tests.ops.cpu_isa import CPU
from tests.ops.experts_oracle import Experts, any_experts, check, check_clamps, experts, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # an fp64 result has no oracle
ANYWHERE = ("reference", "torch", *CPU, None)


@pytest.mark.parametrize("impl", ["reference", "torch", None])
@given(p=any_experts(DTYPES))
def test_values_and_gradients(impl, p: Experts):
    check(p, run(impl, p))


FORMS = [(a, gated) for a in ACTIVATIONS for gated in (True, False) if gated or a not in GATED_ONLY]


@pytest.mark.parametrize(("activation", "gated"), FORMS)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl, activation, gated):
    p = experts(5, 2, 3, 4, 6, torch.float64, gated=gated, biased=True, activation=activation)
    operands = {name: t.requires_grad_() for name, t in p.operands().items()}

    def call(*tensors):
        t = dict(zip(operands, tensors, strict=True))
        biases = {name: t.get(name) for name in ("b1", "b3", "b2")}
        return experts_mlp(
            t["x"], p.ids, t["weights"], t["w1"], t.get("w3"), t["w2"], activation=activation, impl=impl, **biases
        )

    assert torch.autograd.gradcheck(call, tuple(operands.values()))


@pytest.mark.parametrize("impl", ANYWHERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clamps(impl, dtype):
    if (impl, dtype) == ("cpu", torch.float16):
        pytest.skip("no kernels")
    check_clamps(impl, dtype)


@pytest.mark.parametrize("impl", ANYWHERE)
@pytest.mark.parametrize(("num_experts", "num_blocks"), [(6, 2), (5, 2), (3, 4), (4, 1), (2, 5)])
def test_blocks_are_problems_of_their_own(impl, num_experts, num_blocks):
    G = -(-num_experts // num_blocks)
    p = experts(4 * num_blocks, 2, num_experts, 8, 12, torch.float32, biased=True)
    ids = torch.randint(-1, G + 1, (num_blocks, 4, 2), generator=torch.Generator().manual_seed(1))
    x, weights = p.x.view(num_blocks, 4, 8), p.weights.view(num_blocks, 4, 2)
    biases = {"b1": p.b1, "b3": p.b3, "b2": p.b2}
    z = experts_mlp(x, ids, weights, p.w1, p.w3, p.w2, impl=impl, **biases)
    for b in range(num_blocks):
        own = slice(b * G, min((b + 1) * G, num_experts))
        one = {name: bias[own] for name, bias in biases.items()}
        expected = experts_mlp(x[b], ids[b], weights[b], p.w1[own], p.w3[own], p.w2[own], impl=impl, **one)
        torch.testing.assert_close(z[b], expected)


@pytest.mark.parametrize("impl", ANYWHERE)
def test_only_wanted_gradients(impl):
    p = experts(7, 2, 3, 8, 12, torch.float32, biased=True)
    everything = run(impl, p)
    for wanted in p.operands():
        operands = {name: t.detach().requires_grad_(name == wanted) for name, t in p.operands().items()}
        o = [operands[name] for name in ("x", "weights", "w1", "w3", "w2")]
        biases = {name: operands[name] for name in ("b1", "b3", "b2")}
        experts_mlp(o[0], p.ids, *o[1:], impl=impl, **biases).backward(p.grad)
        for name, t in operands.items():
            assert (t.grad is not None) == (name == wanted)
        assert torch.equal(operands[wanted].grad, everything[wanted]), wanted


@pytest.mark.parametrize("impl", ANYWHERE)
def test_without_gradients_the_same_bits(impl):
    p = experts(9, 2, 3, 8, 12, torch.bfloat16, biased=True)
    biases = {"b1": p.b1, "b3": p.b3, "b2": p.b2}
    with torch.no_grad():
        z = experts_mlp(p.x, p.ids, p.weights, p.w1, p.w3, p.w2, impl=impl, **biases)
    assert torch.equal(z, run(impl, p)["z"])


@pytest.mark.parametrize("impl", ANYWHERE)
def test_stride_zero_gradient(impl):
    p = experts(9, 2, 3, 8, 12, torch.float32)
    ones = replace(p, grad=torch.ones(1).expand(9, 8))
    check(ones, run(impl, ones))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", ANYWHERE)
def test_what_is_not_finite_stays_where_it_is(impl, poison):
    p = experts(6, 2, 4, 8, 12, torch.float32)
    ids = torch.tensor([[0, 1], [1, 0], [2, -1], [2, 4], [0, 0], [1, 2]])
    p = replace(p, ids=ids, w1=p.w1.clone())
    clean = run(impl, p)
    p.w1[3] = poison  # idle
    assert all(torch.equal(t, clean[name]) for name, t in run(impl, p).items())
    x = p.x.clone()
    x[2] = poison
    z = run(impl, replace(p, x=x))["z"]
    assert z[2].isnan().any()
    assert torch.equal(z[[0, 1, 3, 4, 5]], clean["z"][[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("impl", ANYWHERE)
def test_biases_that_are_not_finite_stay_with_their_expert(impl):
    p = experts(6, 2, 4, 8, 12, torch.float32, biased=True)
    p = replace(p, ids=torch.tensor([[0, 1], [1, 0], [2, -1], [2, 4], [0, 0], [1, 2]]))
    clean = run(impl, p)
    for bias in (p.b1, p.b3, p.b2):
        bias[3] = torch.inf  # idle
    assert all(torch.equal(t, clean[name]) for name, t in run(impl, p).items())
    grad = p.grad.clone()
    grad[2] = torch.nan
    found = run(impl, replace(p, grad=grad))
    for name in ("w1", "w3", "w2", "b1", "b3", "b2"):
        assert torch.equal(found[name][[0, 1, 3]], clean[name][[0, 1, 3]]), name


@pytest.mark.parametrize("impl", ANYWHERE)
@pytest.mark.parametrize("biased", [False, True])
def test_the_result_may_be_changed_in_place(impl, biased):
    p = experts(6, 2, 4, 8, 12, torch.float32, biased=biased)
    w1 = p.w1.requires_grad_()
    for x, ids, weights in ((p.x, p.ids, p.weights), (p.x[None], p.ids[None], p.weights[None])):
        z = experts_mlp(x, ids, weights, w1, p.w3, p.w2, b2=p.b2, impl=impl)
        z += 1
        z.sum().backward()


@pytest.mark.parametrize("impl", ANYWHERE)
def test_blocks_without_any_expert(impl):
    x, ids, weights = torch.ones(2, 3, 5), torch.zeros(2, 3, 2).long(), torch.ones(2, 3, 2)
    w1, w2, b2 = torch.ones(0, 5, 6), torch.ones(0, 6, 5), torch.ones(0, 5)
    assert not experts_mlp(x, ids, weights, w1, w1, w2, b2=b2, impl=impl).any()


@pytest.mark.parametrize("impl", ANYWHERE)
def test_it_saves_its_arguments_and_the_pre_activations(impl):
    T, K, E, D, F = 50, 4, 8, 16, 24
    p = experts(T, K, E, D, F, torch.bfloat16)
    saved: list[torch.Tensor] = []
    w = [t.detach().requires_grad_() for t in (p.w1, p.w3, p.w2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts_mlp(p.x, p.ids, p.weights, *w, impl=impl)
    arguments = {t.untyped_storage().data_ptr() for t in (p.x, p.ids, p.weights, *w)}
    own = [t for t in saved if t.untyped_storage().data_ptr() not in arguments]
    assert sum(t.untyped_storage().nbytes() for t in own if t.shape[-1] == F) <= 2 * T * K * F * 2
    assert all(t.numel() <= T * K for t in own if t.shape[-1] != F)


@pytest.mark.parametrize("impl", ANYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(impl, dtype):
    p = experts(200, 4, 8, 32, 48, dtype)
    first = run(impl, p)
    assert all(torch.equal(t, first[name]) for name, t in run(impl, p).items())


@given(data=st.data())
def test_one_call_is_grouped_products(data):
    p = data.draw(any_experts((torch.float64,)).filter(lambda p: len(p.w1)))
    flat = replace(p, b1=None, b3=None, b2=None)
    order = moesaic.ops.sort_by_expert(flat.ids, flat.w1.shape[0])
    rows = moesaic.ops.permute(flat.x, order)

    def product(t, w):
        return moesaic.grouped_mm(t, w, order.group_sizes)

    h = moesaic.ops.gated(flat.activation, product(rows, flat.w1), None if flat.w3 is None else product(rows, flat.w3))
    expected = moesaic.ops.combine(product(h, flat.w2), order, flat.weights)
    z = experts_mlp(flat.x, flat.ids, flat.weights, flat.w1, flat.w3, flat.w2, activation=flat.activation)
    torch.testing.assert_close(z, expected)


def test_every_implementation_is_tested():
    assert set(ANYWHERE) | {"cpu", "triton"} >= set(IMPLEMENTATIONS)
