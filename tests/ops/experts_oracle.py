"""What a right result of experts_mlp is: the loop over experts, in fp64 the truth, in the operands' dtype the measure.

The rule: the largest error may be ``MARGINS`` times that of the loop in the same dtype, in which every intermediate is
rounded to the dtype and products of half types are accumulated in fp32. Where that error happens to be small, one
rounding of the largest value stands in for it, or one rounding of the accumulation type, of the sum of the terms'
magnitudes. Where few elements are large, the largest error is luck: it is that of the worst of some loops whose
roundings are drawn at random.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, E experts, r the copies of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moesaic.ops import ACTIVATIONS, experts_mlp, gated
from moesaic.ops.experts_mlp.activation import GATED_ONLY
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from tests.ops.strategies import with_strides

HALF = (torch.bfloat16, torch.float16)
MARGINS = {torch.bfloat16: 1.5, torch.float16: 1.5, torch.float32: 4.0, torch.float64: 4.0}
DRAWS = 32
OPERANDS = ("x", "weights", "w1", "w3", "w2", "b1", "b3", "b2")


@dataclass(frozen=True, repr=False)
class Experts:
    """A call of ``experts_mlp``, and the gradient of its result. ``None`` for what is not given."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    w1: Tensor
    w3: Tensor | None
    w2: Tensor
    b1: Tensor | None
    b3: Tensor | None
    b2: Tensor | None
    grad: Tensor
    activation: str = "silu"

    def __repr__(self) -> str:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        shapes = {n: f"{list(t.shape)} {t.stride()}" for n, t in tensors.items() if isinstance(t, Tensor)}
        return f"Experts({self.x.dtype}, {self.activation}, ids {self.ids.tolist()}, {shapes})"

    def operands(self) -> dict[str, Tensor]:
        """The floating operands that are given."""
        given = {name: getattr(self, name) for name in OPERANDS}
        return {name: t for name, t in given.items() if t is not None}


def experts(
    T: int,
    K: int,
    E: int,
    D: int,
    F: int,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    biased: bool = False,
    activation: str = "silu",
    routing: str = "random",
    weights_dtype: torch.dtype | None = None,
    strides: str = "contiguous",
    seed: int = 0,
) -> Experts:
    """Random operands. ``routing``: random with copies that are not here, all to one expert, or none here.

    Where the activation clamps, some of the pre-activations are beyond the bounds; few of half types, in which a bound
    and what is next to it are one number: the derivative then is that of one side or the other.
    """
    g = torch.Generator().manual_seed(seed)
    reach = 4.0 if activation in GATED_ONLY and dtype not in HALF else 1.0

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    def matrices(*shape: int, scale: float = 1.0) -> Tensor:
        return with_strides(values(*shape, scale=scale * max(shape[1], 1) ** -0.5), strides)

    ids = torch.randint(-1, E + 1, (T, K), generator=g)
    if routing == "one":
        ids = torch.full((T, K), E - 1)
    elif routing == "none":
        ids = torch.full((T, K), E)
    return Experts(
        values(T, D),
        ids,
        torch.rand(T, K, generator=g, dtype=torch.float64).to(weights_dtype or dtype),
        matrices(E, D, F, scale=reach),
        matrices(E, D, F, scale=reach) if gated else None,
        matrices(E, F, D),
        values(E, F) if biased else None,
        values(E, F) if biased and gated else None,
        values(E, D) if biased else None,
        values(T, D),
        activation,
    )


@st.composite
def any_experts(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Experts:
    dim = st.sampled_from((0, 1, 2, 3, 5, 8, 16, 17, 33, 64, 70))
    dtype, is_gated = draw(st.sampled_from(dtypes)), draw(st.booleans())
    return experts(
        draw(st.sampled_from((0, 1, 2, 5, 13, 40, 100))),
        draw(st.integers(0, 4)),
        draw(st.sampled_from((0, 1, 2, 3, 7, 20))),
        draw(dim),
        draw(dim),
        dtype,
        gated=is_gated,
        biased=draw(st.booleans()),
        activation=draw(st.sampled_from([a for a in ACTIVATIONS if is_gated or a not in GATED_ONLY])),
        routing=draw(st.sampled_from(("random", "random", "random", "one", "none"))),
        weights_dtype=draw(st.sampled_from((dtype, torch.float32))),
        strides=draw(st.sampled_from(("contiguous", "transposed", "sliced"))),
        seed=draw(st.integers(0, 2**31)),
    )


def cast(p: Experts, dtype: torch.dtype) -> Experts:
    changed: dict[str, Any] = {name: t.to(dtype) for name, t in p.operands().items()}
    return replace(p, **changed, grad=p.grad.to(dtype))


class _Rounding(torch.autograd.Function):
    """What a rounding to ``dtype`` does to a value, and to its gradient, drawn at random."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        ctx.drawn = dtype, generator
        return t * (1 + torch.finfo(dtype).eps * (torch.rand(t.shape, generator=generator, dtype=t.dtype) - 0.5))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Rounding.forward(ctx, *grads, *ctx.drawn), None, None


def loop(p: Experts, rounded: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Tensor]:
    """The result ``z`` and the gradient of every operand, by the loop over experts and torch's own derivatives.

    ``rounded``: called with every intermediate.
    """
    leaf = {name: t.detach().clone().requires_grad_() for name, t in p.operands().items()}
    z = torch.zeros_like(p.x) + 0 * leaf["x"].sum()  # has a gradient, with no expert too
    for k in range(p.ids.shape[1]):
        for e in range(p.w1.shape[0]):
            t = (p.ids[:, k] == e).nonzero().squeeze(1)
            y = rounded(rounded(leaf["x"][t]) @ leaf["w1"][e])
            y, up = rounded(y + leaf["b1"][e]) if "b1" in leaf else y, None
            if "w3" in leaf:
                up = rounded(rounded(leaf["x"][t]) @ leaf["w3"][e])
                up = rounded(up + leaf["b3"][e]) if "b3" in leaf else up
            y = rounded(rounded(gated(p.activation, y, up)) @ leaf["w2"][e])
            y = rounded(y + leaf["b2"][e]) if "b2" in leaf else y
            z = rounded(z.index_add(0, t, rounded(leaf["weights"][t, k].unsqueeze(1) * y).to(z.dtype)))
    return _with_gradients(z, leaf, p.grad)


def run(impl: str | None, p: Experts, copies: Tensor | None = None) -> dict[str, Tensor]:
    """The same by an implementation; ``copies`` lists those that are here."""
    leaf = {name: t.detach().requires_grad_() for name, t in p.operands().items()}
    z = experts_mlp(
        leaf["x"],
        p.ids,
        leaf["weights"],
        leaf["w1"],
        leaf.get("w3"),
        leaf["w2"],
        activation=p.activation,
        b1=leaf.get("b1"),
        b3=leaf.get("b3"),
        b2=leaf.get("b2"),
        copies=copies,
        impl=impl,
    )
    return _with_gradients(z, leaf, p.grad)


def _with_gradients(z: Tensor, leaf: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(z, list(leaf.values()), grad, materialize_grads=True)
    return {"z": z.detach()} | dict(zip(leaf, found, strict=True))


def largest_error_drawn(p: Experts, truth: Tensor, name: str) -> float:
    """The largest error of loops in fp64 whose roundings to the dtype are drawn at random."""
    generator = torch.Generator().manual_seed(0)
    exact = cast(p, torch.float64)
    draws = [loop(exact, lambda t: _Rounding.apply(t, p.x.dtype, generator)) for _ in range(DRAWS)]
    return max(float((draw[name] - truth).abs().max()) for draw in draws)


def rounding_of_terms(p: Experts, name: str) -> float:
    """Half a unit in the last place of the accumulation dtype, of a result of which no term could cancel another."""
    positive: dict[str, Any] = {operand: t.double().abs() for operand, t in p.operands().items()}
    # What clamps has terms of which nothing is left without their signs; those of SwiGLU are as large.
    activation = "silu" if p.activation in GATED_ONLY else p.activation
    without_signs = loop(replace(p, **positive, grad=p.grad.double().abs(), activation=activation))
    return torch.finfo(accumulation_dtype(p.x.dtype)).eps / 2 * float(without_signs[name].max())


def check(p: Experts, ours: dict[str, Tensor], exact: Experts | None = None) -> None:
    """Assert that the result and all gradients are right, by the rule.

    ``exact``: the call whose result would be right, in fp64, if not that of ``p``, whose operands are rounded.
    """
    truth, measure = loop(exact or cast(p, torch.float64)), loop(p)
    for name, t in ours.items():
        assert t.dtype == (p.weights.dtype if name == "weights" else p.x.dtype), name
        assert t.shape == truth[name].shape, name
        if not t.numel():
            continue
        rounding = torch.finfo(p.x.dtype).eps * float(truth[name].abs().max())
        allowed = max(float((measure[name].double() - truth[name]).abs().max()), rounding)
        error = float((t.double() - truth[name]).abs().max())
        margin = MARGINS[p.x.dtype]
        if error > margin * allowed:
            allowed = max(allowed, rounding_of_terms(p, name), largest_error_drawn(p, truth[name], name))
        assert error <= margin * allowed, f"{name}: error {error:g}, the loop's is {allowed:g}"


def check_clamps(impl: str | None, dtype: torch.dtype) -> None:
    """Assert that clamped_swiglu is right on both sides of its bounds, and on them."""
    ends = torch.tensor([-9, -7 - 2**-5, -7, -1, 0, 1, 7, 7 + 2**-5, 9], dtype=dtype)
    h1, h3 = (h.flatten() for h in torch.meshgrid(ends, ends, indexing="ij"))
    one, w2 = torch.ones(1, 1, dtype=dtype), torch.ones(1, len(h1), 1, dtype=dtype)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    # Products with 1 alone.
    p = Experts(one, ids, one, h1[None, None], h3[None, None], w2, *[None] * 3, one, "clamped_swiglu")
    ours = run(impl, p)
    check(p, ours)
    assert torch.equal(ours["w1"].flatten() == 0, (h1 > 7) | (h3 == -1))
    assert torch.equal(ours["w3"].flatten() == 0, (h3.abs() > 7) | (h1 == 0))
