"""transformers' activation modules by the names that our operators and layers have for them."""

from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)

from moesaic.ops import Activation

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
    """Our name for an activation, or None where we have none. By exact type: a subclass may compute something else."""
    return _NAMES.get(type(function))
