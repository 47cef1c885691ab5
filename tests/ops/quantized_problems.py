"""Calls of experts_mlp with quantised weights, and the same calls with the weights that they stand for."""

from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from moesaic.ops import experts_mlp
from moesaic.ops.quantized import FORMATS, Format, QuantizedWeight, quantize
from tests.ops.experts_oracle import Experts, cast, experts

WEIGHTS = ("w1", "w3", "w2")


class Quantized(NamedTuple):
    """A call, with the decoded weights in the dtype of the tokens and exactly, and the weights themselves."""

    rounded: Experts
    exact: Experts
    weights: dict[str, QuantizedWeight]


def quantized(p: Experts, format: Format) -> Quantized:
    weights = {name: quantize(w, format) for name in WEIGHTS if (w := getattr(p, name)) is not None}
    decoded = {name: w.dequantize() for name, w in weights.items()}
    return Quantized(
        replace(p, **{name: w.to(p.x.dtype) for name, w in decoded.items()}),
        replace(cast(p, torch.float64), **{name: w.double() for name, w in decoded.items()}),
        weights,
    )


@st.composite
def any_to_quantize(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> tuple[Experts, Format]:
    """What :func:`quantized` takes: sizes with and without whole blocks, idle experts, no rows, no experts."""
    format = draw(st.sampled_from(sorted(FORMATS)))
    sizes = (32, 64, 96, 160) if format == "mxfp4" else (0, 1, 5, 16, 33, 64, 70, 128)
    gated = draw(st.booleans())
    p = experts(
        draw(st.sampled_from((0, 1, 3, 7, 40, 250))),
        draw(st.integers(0, 3)),
        draw(st.sampled_from((0, 1, 2, 5))),
        draw(st.sampled_from(sizes)),
        draw(st.sampled_from(sizes)),
        draw(st.sampled_from(dtypes)),
        gated=gated,
        biased=draw(st.booleans()),
        routing=draw(st.sampled_from(("random", "random", "one", "none"))),
        weights_dtype=torch.float32,
        seed=draw(st.integers(0, 2**31)),
    )
    return p, format


def run(impl: str | None, q: Quantized) -> dict[str, Tensor]:
    """The result ``z``, and the gradients of everything but the weights."""
    p = q.rounded
    leaf = {name: t.detach().requires_grad_() for name, t in p.operands().items() if name not in WEIGHTS}
    biases = {name: leaf.get(name) for name in ("b1", "b3", "b2")}
    w1, w3, w2 = map(q.weights.get, WEIGHTS)
    assert w1 is not None
    assert w2 is not None
    z = experts_mlp(leaf["x"], p.ids, leaf["weights"], w1, w3, w2, activation=p.activation, impl=impl, **biases)
    found = torch.autograd.grad(z, list(leaf.values()), p.grad, materialize_grads=True)
    return {"z": z.detach()} | dict(zip(leaf, found, strict=True))
