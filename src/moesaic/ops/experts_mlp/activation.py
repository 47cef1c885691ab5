"""The hidden rows of an expert, ``hidden(h1, h3)``, and their derivatives, in plain PyTorch.

With a gate the hidden row is ``act(h1) * h3``, without one ``act(h1)``:

=============  ==========================================================================
name           ``act(h)``
=============  ==========================================================================
``silu``       ``h sigmoid(h)``; gated: SwiGLU
``gelu``       ``h Phi(h)``; gated: GEGLU
``gelu_tanh``  ``h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2``, its approximation
``relu``       ``max(h, 0)``; gated: ReGLU
``relu2``      ``max(h, 0)^2`` (So et al. 2021, Primer)
=============  ==========================================================================

One is a function of both, and there is no form of it without a gate: ``clamped_swiglu`` (gpt-oss) is
``(clamp(h3, -7, 7) + 1) * g * sigmoid(1.702 g)`` with ``g = min(h1, 7)``.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.grouped_mm.groups import accumulation_dtype

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]

# The place in it is the code that operators and kernels take.
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
}


GATED_ONLY: tuple[Activation, ...] = ("clamped_swiglu",)

CLAMPED_SWIGLU_ALPHA, CLAMPED_SWIGLU_LIMIT = 1.702, 7.0


class Slopes(NamedTuple):
    """The derivatives of a hidden row by ``h1`` and by ``h3``; the second is None without a gate."""

    h1: Tensor
    h3: Tensor | None


def gated(activation: Activation, h1: Tensor, h3: Tensor | None) -> Tensor:
    """The hidden row: ``act(h1) * h3``, or ``act(h1)`` without a gate, or what else the activation is of the two.

    Args:
        activation: its name, one of ``ACTIVATIONS``.
        h1, h3: pre-activations of gate and up projection, of any shape and floating dtype. None for no gate.

    Raises:
        ValueError: no ``h3`` for an activation that is of both.

    Example:
        >>> moesaic.ops.gated("silu", torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
        tensor([0.0000, 1.4621])
    """
    if activation in GATED_ONLY:
        if h3 is None:
            raise ValueError(no_gate(activation))
        g = h1.clamp(max=CLAMPED_SWIGLU_LIMIT)
        up = h3.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
        return (up + 1) * (g * torch.sigmoid(CLAMPED_SWIGLU_ALPHA * g))
    a = _FUNCTIONS[activation](h1)
    return a if h3 is None else a * h3


def no_gate(activation: str) -> str:
    """The error for an activation that there is no form of without a gate."""
    return f"activation: {activation!r} is of both projections, and there is no w3; give it, or choose another"


def hidden(activation: Activation, h1: Tensor, h3: Tensor | None) -> Tensor:
    """:func:`gated`, computed in the accumulation dtype and rounded to the operands'."""
    acc = accumulation_dtype(h1.dtype)
    return gated(activation, h1.to(acc), None if h3 is None else h3.to(acc)).to(h1.dtype)


def slopes(activation: Activation, h1: Tensor, h3: Tensor | None) -> Slopes:
    """The derivatives of :func:`gated`. Those of a clamped value are torch's: 1 up to the bound and on it, 0 beyond."""
    if activation in GATED_ONLY:
        assert h3 is not None
        g = h1.clamp(max=CLAMPED_SWIGLU_LIMIT)
        up = h3.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
        s = torch.sigmoid(CLAMPED_SWIGLU_ALPHA * g)
        by_gate = (up + 1) * s * (1 + CLAMPED_SWIGLU_ALPHA * g * (1 - s))
        return Slopes(
            torch.where(h1 <= CLAMPED_SWIGLU_LIMIT, by_gate, 0.0),
            torch.where(h3.abs() <= CLAMPED_SWIGLU_LIMIT, g * s, 0.0),
        )
    slope = _derivative(activation, h1)
    return Slopes(slope, None) if h3 is None else Slopes(slope * h3, _FUNCTIONS[activation](h1))


def _derivative(name: str, h: Tensor) -> Tensor:
    if name == "silu":
        s = torch.sigmoid(h)
        return s * (1 + h * (1 - s))
    if name == "gelu":
        normal_density = torch.exp(-0.5 * h.square()) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * (1 + torch.erf(h * math.sqrt(0.5))) + h * normal_density
    if name == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (h + 0.044715 * h.pow(3)))
        return 0.5 * (1 + t) + 0.5 * h * (1 - t.square()) * c * (1 + 3 * 0.044715 * h.square())
    if name == "relu":
        return torch.where(h <= 0, 0.0, 1.0).to(h.dtype)
    return 2 * F.relu(h)
