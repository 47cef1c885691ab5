"""experts_mlp under what PyTorch does to operators: schema checks, fake tensors, autocast, compilation."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.ops import experts_mlp
from tests.ops.experts_oracle import cast, experts, run
from tests.ops.strategies import with_strides

pytestmark = pytest.mark.slow

ops = torch.ops.moesaic
IMPLS = [None, "reference", "torch"]
# x, weights, w1, w3, w2, b1, b3, b2.
NOTHING, ONLY_X, EVERYTHING = [False] * 8, [True, *[False] * 7], [True] * 8


def arguments(gated=True, biased=False, dtype=torch.float32, strides="contiguous"):
    p = experts(6, 2, 3, 8, 12, dtype, gated=gated, biased=biased, strides=strides)
    x = with_strides(p.x, strides)
    return (x[None], p.ids[None], p.weights[None], torch.rand(1, 3), p.w1, p.w3, p.w2, p.b1, p.b3, p.b2)


def differentiable(args):
    return tuple(t.requires_grad_() if t is not None and t.is_floating_point() else t for t in args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, False), (True, True), (False, True)])
def test_opcheck(impl, gated, biased):
    args = arguments(gated, biased)
    torch.library.opcheck(ops.experts_mlp_inference, (*args, "silu", impl))
    _, h1, h3 = ops.experts_mlp(*args, "silu", impl)
    for needs in (NOTHING, ONLY_X, EVERYTHING):
        torch.library.opcheck(ops.experts_mlp_backward, (args[0], *args, h1, h3, "silu", impl, needs))
    # `experts`, of which the shape alone is read, has no gradient.
    floating = differentiable(args)
    torch.library.opcheck(ops.experts_mlp, (*floating[:3], floating[3].detach(), *floating[4:], "silu", impl))


@pytest.mark.parametrize("needs", [NOTHING, ONLY_X, [False, True, True, False, True, False, False, True], EVERYTHING])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
def test_fakes_say_what_comes(strides, gated, needs):
    args = arguments(gated, biased=True, strides=strides)
    z, h1, h3 = ops.experts_mlp(*args, "silu", None)
    gradients = ops.experts_mlp_backward(z, *args, h1, h3, "silu", None, needs)
    with FakeTensorMode() as mode:
        fake = tuple(mode.from_tensor(t) if t is not None else None for t in args)
        outputs = ops.experts_mlp(*fake, "silu", None)
        found = (*outputs, *ops.experts_mlp_backward(outputs[0], *fake, *outputs[1:], "silu", None, needs))
    for real, said in zip((z, h1, h3, *gradients), found, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (said.shape, said.stride(), said.dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_lie_as_their_weights_do(impl):
    args = arguments(strides="transposed")
    z, h1, h3 = ops.experts_mlp(*args, "silu", impl)
    gradients = ops.experts_mlp_backward(z, *args, h1, h3, "silu", impl, EVERYTHING)
    assert all(g.mT.is_contiguous() for g in gradients[2:5])


def test_unwanted_gradients_take_no_memory():
    args = arguments(gated=False)
    z, h1, h3 = ops.experts_mlp(*args, "silu", None)
    assert h3.untyped_storage().nbytes() == 4
    gradients = ops.experts_mlp_backward(z, *args, h1, h3, "silu", None, ONLY_X)
    assert [g.untyped_storage().nbytes() for g in gradients[1:]] == [4] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(dtype):
    p = experts(6, 2, 3, 8, 12, dtype, biased=True, weights_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(None, p)
    rounded = torch.bfloat16 if dtype == torch.float32 else torch.float64
    by_hand = run(None, replace(cast(p, rounded), weights=p.weights))
    for name, t in under.items():
        assert torch.equal(t, by_hand[name].to(t.dtype)), name
    assert under["z"].dtype == rounded


# Without a rule of its own torch goes through the batch, and says that this is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap(unchecked):
    p = experts(6, 2, 3, 8, 12, torch.float64)
    x = torch.stack([p.x, p.x + 1])

    def one(x):
        return experts_mlp(x, p.ids, p.weights, p.w1, p.w3, p.w2)

    torch.testing.assert_close(torch.vmap(one)(x), torch.stack([one(x[0]), one(x[1])]))


COMPILED = """
import torch, moesaic
from moesaic.ops import experts_mlp

torch.manual_seed(0)
E, D, F, K = 3, 8, 12, 2
w = [torch.randn(s, requires_grad=True) for s in ((E, D, F), (E, D, F), (E, F, D))]

def layer(x, ids, weights, w1, w3, w2):
    return experts_mlp(x, ids, weights, w1, w3, w2).sin()

compiled = torch.compile(layer, fullgraph=True, dynamic=True)
for T in (6, 9, 1):
    x, weights, ids = torch.randn(T, D, requires_grad=True), torch.rand(T, K), torch.randint(-1, E, (T, K))
    for call in (lambda f: f(x, ids, weights, *w), lambda f: f(x, ids, weights, w[0], None, w[2])):
        expected, actual = call(layer), call(compiled)
        torch.testing.assert_close(actual, expected)
        leaves = [x, w[0], w[2]]
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, ids, weights, *w), layer(x, ids, weights, *w))
print("same")
"""


def test_compiled_in_one_graph(forked_python):
    assert forked_python(COMPILED).stdout.strip() == "same"
