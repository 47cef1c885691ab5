"""What experts_mlp refuses, and what it says: the argument, the value, and the remedy."""

import pytest
import torch

from moesaic.ops import experts_mlp
from tests.ops.experts_oracle import experts

T, K, E, D, F = 5, 2, 3, 8, 12
SHAPES = {"x": (T, D), "ids": (T, K), "weights": (T, K), "w1": (E, D, F), "w3": (E, D, F), "w2": (E, F, D)}


def call(changes, **options):
    p = experts(T, K, E, D, F, torch.float32)
    t = {name: getattr(p, name) for name in SHAPES} | changes
    return experts_mlp(t["x"], t["ids"], t["weights"], t["w1"], t["w3"], t["w2"], **options)


def rand(*shape, dtype=torch.float32):
    return torch.rand(shape).to(dtype)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"x": rand(D)}, {}, "x: expected [T, D] or [B, T, D], got [8]; flatten leading dims with x.flatten(0, -2)"),
        ({"ids": torch.zeros(4, K).long()}, {}, "topk_ids: expected [5, K] to match x, got [4, 2]"),
        ({"ids": torch.zeros(T).long()}, {}, "topk_ids: expected [5, K] to match x, got [5]"),
        ({"weights": rand(T, 3)}, {}, "topk_weights: expected [5, 2] to match topk_ids, got [5, 3]"),
        ({"w1": rand(D, F)}, {}, "w1: expected [E, D, F], got [8, 12]"),
        (
            {"w1": rand(E, F, D)},
            {},
            "w1: expected [E, 8, F] to match x, got [3, 12, 8]; w1 looks transposed, pass",
        ),
        ({"w3": rand(E, F, D)}, {}, "w3: expected [3, 8, 12] to match x and w1, got [3, 12, 8]; w3 looks transposed"),
        ({"w2": rand(E, D, F)}, {}, "w2: expected [3, 12, 8] to match x and w1, got [3, 8, 12]; w2 looks transposed"),
        ({"w2": rand(E + 1, F, D)}, {}, "w2: expected [3, 12, 8] to match x and w1, got [4, 12, 8]"),
        ({}, {"b1": rand(E, D)}, "b1: expected [3, 12] to match x and w1, got [3, 8]"),
        ({}, {"b2": rand(F)}, "b2: expected [3, 8] to match x and w1, got [12]"),
        ({"w3": None}, {"b3": rand(E, F)}, "b3: given without w3; leave it out"),
        (
            {"x": rand(0, T, D), "ids": torch.zeros(0, T, K).long(), "weights": rand(0, T, K)},
            {},
            "x: no block for 3",
        ),
        ({}, {"impl": "fast"}, "impl: unknown implementation 'fast'; choose one of ["),
        ({}, {"activation": "swish"}, "activation: unknown activation 'swish'; choose one of ['silu', 'gelu', "),
        (
            {"w3": None},
            {"activation": "clamped_swiglu"},
            "activation: 'clamped_swiglu' needs a gate, and there is no w3; give w3, or choose another",
        ),
        ({"w1": torch.empty(E, D, F, device="meta")}, {}, "w1: is on meta, x on cpu; move it there"),
    ],
)
def test_values_that_do_not_fit(unchecked, changes, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the message is compared
        call(changes, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"x": torch.zeros(T, D, dtype=torch.int32)}, {}, "x: dtype torch.int32 is not supported; use one of"),
        (
            {"w2": rand(E, F, D, dtype=torch.bfloat16)},
            {},
            "w2: dtype torch.bfloat16 differs from x's torch.float32",
        ),
        (
            {},
            {"b1": rand(E, F, dtype=torch.float64)},
            "b1: dtype torch.float64 differs from x's torch.float32",
        ),
        ({"ids": rand(T, K)}, {}, "topk_ids: dtype torch.float32 is not supported; use int32 or int64"),
        ({"weights": torch.zeros(T, K).long()}, {}, "topk_weights: dtype torch.int64 is not supported; use one of"),
    ],
)
def test_types_that_do_not_fit(unchecked, changes, options, message):
    with pytest.raises(TypeError) as caught:
        call(changes, **options)
    assert str(caught.value).startswith(message)


def test_no_second_derivative():
    p = experts(T, K, E, D, F, torch.float64)
    x = p.x.requires_grad_()
    z = experts_mlp(x, p.ids, p.weights, p.w1, p.w3, p.w2)
    (gx,) = torch.autograd.grad(z, x, p.grad.requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; build the experts of grouped_mm, permute"):
        gx.sum().backward()


def test_the_operator_without_memory_refuses_to_be_differentiated():
    p = experts(T, K, E, D, F, torch.float32)
    x = p.x.unsqueeze(0).requires_grad_()
    args = (x, p.ids[None], p.weights[None], torch.empty(1, E), p.w1, p.w3, p.w2, None, None, None, "silu", None)
    with pytest.raises(NotImplementedError, match="keeps nothing to differentiate with; call moesaic.experts_mlp"):
        torch.ops.moesaic.experts_mlp_inference(*args).sum().backward()
