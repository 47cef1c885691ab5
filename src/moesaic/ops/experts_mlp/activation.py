"""The hidden rows of an expert and their derivatives, in plain PyTorch.

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

One needs a gate, for it is a function of both: ``clamped_swiglu`` (gpt-oss) is ``(clamp(h3, -7, 7) + 1) * g *
sigmoid(1.702 g)`` with ``g = min(h1, 7)``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.grouped_mm.groups import accumulation_dtype

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]

# In the order of the kernels' codes.
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

CLAMPED_SWIGLU_ALPHA, CLAMPED_SWIGLU_LIMIT = 1.702, 7.0


class _Scalar(NamedTuple):
    """A function of the first pre-activation, and its derivative. A gate multiplies it by the second."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


class _OfBoth(NamedTuple):
    """A function of both pre-activations, and its derivatives by each."""

    value: Callable[[Tensor, Tensor], Tensor]
    derivatives: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _silu_derivative(h: Tensor) -> Tensor:
    s = torch.sigmoid(h)
    return s * (1 + h * (1 - s))


def _gelu_derivative(h: Tensor) -> Tensor:
    normal_density = torch.exp(-0.5 * h.square()) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(h * math.sqrt(0.5))) + h * normal_density


def _gelu_tanh_derivative(h: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (h + 0.044715 * h.pow(3)))
    return 0.5 * (1 + t) + 0.5 * h * (1 - t.square()) * c * (1 + 3 * 0.044715 * h.square())


def _clamped_swiglu(h1: Tensor, h3: Tensor) -> Tensor:
    g = h1.clamp(max=CLAMPED_SWIGLU_LIMIT)
    up = h3.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
    return (up + 1) * (g * torch.sigmoid(CLAMPED_SWIGLU_ALPHA * g))


def _clamped_swiglu_derivatives(h1: Tensor, h3: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a clamped value are torch's: 1 up to the bound and on it, 0 beyond."""
    g = h1.clamp(max=CLAMPED_SWIGLU_LIMIT)
    up = h3.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
    s = torch.sigmoid(CLAMPED_SWIGLU_ALPHA * g)
    by_gate = (up + 1) * s * (1 + CLAMPED_SWIGLU_ALPHA * g * (1 - s))
    return (
        torch.where(h1 <= CLAMPED_SWIGLU_LIMIT, by_gate, 0.0),
        torch.where(h3.abs() <= CLAMPED_SWIGLU_LIMIT, g * s, 0.0),
    )


_FUNCTIONS: dict[Activation, _Scalar | _OfBoth] = {
    "silu": _Scalar(F.silu, _silu_derivative),
    "gelu": _Scalar(F.gelu, _gelu_derivative),
    "gelu_tanh": _Scalar(lambda h: F.gelu(h, approximate="tanh"), _gelu_tanh_derivative),
    "relu": _Scalar(F.relu, lambda h: torch.where(h <= 0, 0.0, 1.0).to(h.dtype)),
    "relu2": _Scalar(lambda h: F.relu(h).square(), lambda h: 2 * F.relu(h)),
    "clamped_swiglu": _OfBoth(_clamped_swiglu, _clamped_swiglu_derivatives),
}

GATED_ONLY = tuple(name for name, function in _FUNCTIONS.items() if isinstance(function, _OfBoth))


def gated(activation: Activation, h1: Tensor, h3: Tensor | None) -> Tensor:
    """The hidden row: ``act(h1) * h3``, ``act(h1)`` without a gate, or another function of both.

    Args:
        activation: its name, one of ``ACTIVATIONS``.
        h1, h3: pre-activations of gate and up projection, of any shape and floating dtype. None for no gate.

    Raises:
        ValueError: no ``h3`` for an activation that needs a gate.

    Example:
        >>> moesaic.ops.gated("silu", torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
        tensor([0.0000, 1.4621])
    """
    return _row(activation, (h1,) if h3 is None else (h1, h3))


def check_activation(activation: str, is_gated: bool) -> None:
    """Raise ``ValueError`` unless it is an activation, and one that has this form."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: unknown activation {activation!r}; choose one of {list(ACTIVATIONS)}")
    if activation in GATED_ONLY and not is_gated:
        raise ValueError(f"activation: {activation!r} needs a gate, and there is no w3; give w3, or choose another")


def hidden(activation: Activation, pre: Sequence[Tensor]) -> Tensor:
    """The hidden row of one pre-activation, or of two, computed in the accumulation dtype and rounded to theirs."""
    acc = accumulation_dtype(pre[0].dtype)
    return _row(activation, [h.to(acc) for h in pre]).to(pre[0].dtype)


def slopes(activation: Activation, pre: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The derivatives of the hidden row by each pre-activation."""
    function = _FUNCTIONS[activation]
    if isinstance(function, _OfBoth):
        h1, h3 = pre
        return function.derivatives(h1, h3)
    slope = function.derivative(pre[0])
    return (slope,) if len(pre) == 1 else (slope * pre[1], function.value(pre[0]))


def _row(activation: Activation, pre: Sequence[Tensor]) -> Tensor:
    check_activation(activation, is_gated=len(pre) == 2)
    function = _FUNCTIONS[activation]
    if isinstance(function, _OfBoth):
        h1, h3 = pre
        return function.value(h1, h3)
    a = function.value(pre[0])
    return a if len(pre) == 1 else a * pre[1]
