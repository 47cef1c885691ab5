"""The calls of a model and of the decoders in it, for the hooks on them."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moesaic.layers import MoE


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call of ``model.forward`` by name, the model itself first."""
    return _signature(type(model)).bind(model, *args, **kwargs)


def parameter_names(model: type[nn.Module]) -> set[str]:
    """The names that the signature of a model's ``forward`` has."""
    return set(_signature(model).parameters)


@functools.cache
def _signature(model: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(model.forward)


def models_with_labels(model: nn.Module) -> Iterator[Any]:
    """Every model of transformers in a module that can make a loss of labels: the module itself, or what it wraps."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "labels" in parameter_names(type(module)):
            yield module


def stacks_of(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Every decoder in a model, and its list of layers."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(map(_has_moe, child)):
                yield module, child


def _has_moe(layer: nn.Module) -> bool:
    return any(isinstance(child, MoE) for child in layer.children())
