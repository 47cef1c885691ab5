"""The activations of experts_mlp, and their derivatives, in plain PyTorch.

=============  ==========================================================================
name           ``act(h)``
=============  ==========================================================================
``silu``       ``h sigmoid(h)``; gated: SwiGLU
``gelu``       ``h Phi(h)``; gated: GEGLU
``gelu_tanh``  ``h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2``, its approximation
``relu``       ``max(h, 0)``; gated: ReGLU
``relu2``      ``max(h, 0)^2`` (So et al. 2021, Primer)
=============  ==========================================================================
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.grouped_mm.groups import accumulation_dtype

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

# The place in it is the code that operators and kernels take.
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
}


def activate(name: str, h: Tensor) -> Tensor:
    """``act(h)``, of any shape and dtype."""
    return _FUNCTIONS[name](h)


def hidden(name: str, h1: Tensor, h3: Tensor | None) -> Tensor:
    """``act(h1) * h3``, or ``act(h1)`` without a gate: computed in the accumulation dtype, rounded to the operands'."""
    acc = accumulation_dtype(h1.dtype)
    a = activate(name, h1.to(acc))
    return (a if h3 is None else a * h3.to(acc)).to(h1.dtype)


def derivative(name: str, h: Tensor) -> Tensor:
    """``act'(h)``, of any shape and dtype."""
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
