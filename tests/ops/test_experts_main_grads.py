"""experts_mlp with main gradients: what is added, to which buffers, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moesaic.layers import GroupedExperts
from moesaic.ops import experts_mlp
from tests.ops.cpu_isa import CPU, dtypes_of
from tests.ops.experts_oracle import Experts, any_experts, cast, experts, loop, run

pytestmark = pytest.mark.slow

IMPLS = ("reference", "torch", None, *CPU)
WEIGHTS = ("w1", "w3", "w2")
each_impl = pytest.mark.parametrize("impl", IMPLS)


def call(p: Experts, into: dict[str, torch.Tensor], impl: str | None) -> dict[str, torch.Tensor | None]:
    """Run both passes, and give back the gradients that autograd has."""
    leaf = {name: t.detach().requires_grad_() for name, t in p.operands().items()}
    operands = (leaf["x"], p.ids, leaf["weights"], leaf["w1"], leaf.get("w3"), leaf["w2"])
    biases = {name: leaf.get(name) for name in ("b1", "b3", "b2")}
    buffers = tuple(into.get(name) for name in WEIGHTS)
    z = experts_mlp(*operands, activation=p.activation, impl=impl, main_grads=buffers, **biases)
    z.backward(p.grad)
    return {name: t.grad for name, t in leaf.items()}


def buffers_for(p: Experts, value: float = 0.0) -> dict[str, torch.Tensor]:
    dtype = torch.promote_types(p.x.dtype, torch.float32)
    return {n: torch.full_like(t, value, dtype=dtype) for n, t in p.operands().items() if n in WEIGHTS}


@each_impl
@given(data=st.data())
def test_other_gradients_are_what_they_were(impl, data):
    p = data.draw(any_experts(dtypes_of(impl)))
    expected = run(impl, p)
    for name, found in call(p, {n: t.contiguous() for n, t in buffers_for(p).items()}, impl).items():
        if name in WEIGHTS:
            assert found is None
        else:
            assert torch.equal(found, expected[name]), name


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_several_backward_passes_as_accurate_as_fp32_sums(impl, dtype, transposed):
    parts = [experts(40, 2, 3, 24, 20, dtype, biased=True, seed=i) for i in range(4)]
    weights = {name: getattr(parts[0], name) for name in WEIGHTS}
    parts = [replace(p, **weights) for p in parts]
    into = buffers_for(parts[0])
    if transposed:
        into = {name: t.mT.contiguous().mT for name, t in into.items()}
    for p in parts:
        call(p, into, impl)
    exact = [loop(cast(p, torch.float64)) for p in parts]
    rounded = [run(impl, p) for p in parts]
    for name, found in into.items():
        truth = sum(e[name] for e in exact)
        summed = sum(r[name].float() for r in rounded)
        error, allowed = (float((t.double() - truth).norm()) for t in (found, summed))
        assert error <= 1.5 * allowed, name


@each_impl
def test_no_bit_is_lost(impl):
    # Of one token the gradient of w1 is 256, of the other 1: the sum is no bf16 number, and neither is what it makes.
    x, weights, grad = torch.ones(2, 1).bfloat16(), torch.ones(2, 1), torch.tensor([[256.0], [1.0]]).bfloat16()
    w = torch.ones(1, 1, 1).bfloat16()
    p = Experts(x, torch.zeros(2, 1).long(), weights, w, None, w, None, None, None, grad, "relu")
    into = buffers_for(p, 2.0**16)
    for _ in range(3):
        call(p, into, impl)
    assert {name: float(t) for name, t in into.items()} == {"w1": 2**16 + 3 * 257, "w2": 2**16 + 3 * 257}


@each_impl
def test_experts_without_tokens_keep_their_values(impl):
    p = replace(experts(6, 1, 3, 8, 12, torch.float32), ids=torch.tensor([[0], [2], [0], [2], [0], [-1]]))
    into = buffers_for(p)
    for t in into.values():
        t[1] = torch.inf
    call(p, into, impl)
    assert all(torch.equal(t[1], torch.full_like(t[1], torch.inf)) for t in into.values())
    assert all(t[[0, 2]].isfinite().all() for t in into.values())


@each_impl
def test_only_weights_that_want_a_gradient(impl):
    p = experts(7, 2, 3, 8, 12, torch.float32)
    into, all_of_them = buffers_for(p), buffers_for(p)
    call(p, all_of_them, impl)
    w3 = p.w3.detach().requires_grad_()
    experts_mlp(p.x, p.ids, p.weights, p.w1, w3, p.w2, impl=impl, main_grads=tuple(into.values())).backward(p.grad)
    assert torch.equal(into["w3"], all_of_them["w3"])
    assert not into["w1"].any()
    assert not into["w2"].any()


def test_autocast_and_recomputation():
    p = experts(7, 2, 3, 8, 12, torch.float32)
    into, expected = buffers_for(p), buffers_for(p)
    call(cast(p, torch.bfloat16), expected, "torch")
    x, *w = (t.detach().requires_grad_() for t in (p.x, p.w1, p.w3, p.w2))

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return experts_mlp(x, p.ids, p.weights.bfloat16(), *w, impl="torch", main_grads=tuple(into.values()))

    checkpoint(forward, x, use_reentrant=False).backward(p.grad.bfloat16())
    assert all(torch.equal(t, expected[name]) for name, t in into.items())
    assert all(t.grad is None for t in w)


def test_of_a_module():
    torch.manual_seed(0)
    module = GroupedExperts(3, 8, 12, dtype=torch.bfloat16)
    p = replace(P, w1=module.w1.detach(), w3=module.w3.detach(), w2=module.w2.detach())
    into, expected = buffers_for(p), buffers_for(p)
    call(p, expected, None)
    module.main_grads = tuple(into.values())
    module(p.x, p.ids, p.weights).backward(p.grad)
    assert all(torch.equal(t, expected[name]) for name, t in into.items())
    assert all(w.grad is None for w in module.parameters())


@pytest.mark.parametrize("impl", [None, "reference", "torch"])
def test_opcheck(impl):
    p = experts(7, 2, 3, 8, 12, torch.bfloat16, biased=True)
    operands = (p.x[None], p.ids[None], p.weights[None], p.ids.new_empty(1, 3), p.w1, p.w3, p.w2, p.b1, p.b3, p.b2)
    _, h1, h3 = torch.ops.moesaic.experts_mlp(*operands, "silu", impl)
    needs = [True, True, False, False, False, True, True, True]
    args = (p.grad[None], *operands, h1, h3, *buffers_for(p).values(), "silu", impl, needs)
    torch.library.opcheck(torch.ops.moesaic.experts_mlp_backward_into, args)


def test_fake_tensors():
    p = experts(7, 2, 3, 8, 12, torch.bfloat16, biased=True)
    into = buffers_for(p)
    with FakeTensorMode() as mode:
        fake = replace(p, **{n: mode.from_tensor(t) for n, t in p.operands().items()}, ids=mode.from_tensor(p.ids))
        fake = replace(fake, grad=mode.from_tensor(p.grad))
        found = call(fake, {n: mode.from_tensor(t) for n, t in into.items()}, "torch")
    assert found["x"].shape == p.x.shape


P = experts(5, 2, 3, 8, 12, torch.bfloat16)
W1, W3, W2 = buffers_for(P).values()


@pytest.mark.parametrize(
    ("buffers", "kind", "message"),
    [
        ((W1, W3), ValueError, "main_grads: expected one buffer each for w1, w3 and w2, got 2"),
        ((W1, None, W2), ValueError, "main_grads: no buffer for w3; give one"),
        (
            (W1, W3, W2.bfloat16()),
            TypeError,
            "main_grads: the buffer for w2 is torch.bfloat16; for weights",
        ),
        (
            (W2, W3, W2),
            ValueError,
            r"main_grads: the buffer for w1 is \[3, 12, 8\]; give \[3, 8, 12\], the",
        ),
        (
            (W1, W3, torch.zeros(3, 12, 16)[..., ::2]),
            ValueError,
            r"main_grads: the buffer for w2 has strides",
        ),
        ((W1, W3, W2.to("meta")), ValueError, "main_grads: the buffer for w2 is on meta, w2 on cpu; move it there"),
        ((W1, W3, W2.clone().requires_grad_()), ValueError, "main_grads: the buffer for w2 requires a gradient"),
    ],
)
def test_what_does_not_fit(unchecked, buffers, kind, message):
    with pytest.raises(kind, match=message):
        experts_mlp(P.x, P.ids, P.weights, P.w1, P.w3, P.w2, main_grads=buffers)


def test_a_buffer_without_weight(unchecked):
    with pytest.raises(ValueError, match="main_grads: a buffer, and there is no w3 for w3; give None"):
        experts_mlp(P.x, P.ids, P.weights, P.w1, None, P.w2, main_grads=(W1, W3, W2))


def test_compilation_stops_there(forked_python):
    said = forked_python(COMPILED).stdout
    assert "main_grads: not under torch.compile(fullgraph=True)" in said
    assert said.endswith("a graph break: the same\n")


COMPILED = """
import torch
from moesaic.ops import experts_mlp

x, ids, weights = torch.randn(3, 4), torch.zeros(3, 1).long(), torch.ones(3, 1)
w = [torch.randn(2, 4, 4, requires_grad=True) for _ in range(3)]
into, expected = ([torch.zeros(2, 4, 4) for _ in w] for _ in range(2))

def run(x, into):
    return experts_mlp(x, ids, weights, *w, main_grads=tuple(into)) * 2

try:
    torch.compile(run, backend="aot_eager", fullgraph=True)(x, into)
except Exception as error:
    print(error)
torch.compile(run, backend="aot_eager")(x, into).sum().backward()
run(x, expected).sum().backward()
assert all(map(torch.equal, into, expected))
print("a graph break: the same")
"""


def test_dtensors_are_refused(ranks):
    assert set(ranks(_on_dtensors, 2)) == {
        "main_grads: for plain tensors, and w1 or its buffer is a DTensor; give local tensors, as "
        'parallelize(..., compute="local") does with the weights'
    }


def _on_dtensors() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    tensors = [distribute_tensor(t, mesh, [Replicate()]) for t in (P.x, P.ids, P.weights, P.w1, P.w3, P.w2)]
    try:
        experts_mlp(*tensors, main_grads=(W1, W3, W2))
    except TypeError as error:
        return str(error)
    return "no error"
