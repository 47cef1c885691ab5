"""The names that our operators and layers have for the activation modules of transformers."""

from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moesaic.ops import Activation
from moesaic.ops.experts_mlp.activation import CLAMPED_SWIGLU_ALPHA, CLAMPED_SWIGLU_LIMIT

_NAMES: dict[type, Activation] = {
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    ReLUSquaredActivation: "relu2",
}


def activation_name(function: object) -> Activation | None:
    """Our name for an activation, or None. The type has to match exactly: a subclass may compute something else."""
    # LFM2 has the function itself.
    return "silu" if function is F.silu else _NAMES.get(type(function))


def own_gate_name(experts: Any) -> Activation | None:
    """Our name for a gate function of an experts module, or None. Function and constants have to match exactly."""
    constants = (getattr(experts, "alpha", None), getattr(experts, "limit", None))
    is_ours = constants == (CLAMPED_SWIGLU_ALPHA, CLAMPED_SWIGLU_LIMIT)
    return "clamped_swiglu" if type(experts)._apply_gate is GptOssExperts._apply_gate and is_ours else None
