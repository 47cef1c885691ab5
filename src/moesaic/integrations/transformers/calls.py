"""The calls of a model and of the decoders in it, for the hooks on them."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

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


def stacks_of(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Every decoder in a model, and its list of layers."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(map(_has_moe, child)):
                yield module, child


def _has_moe(layer: nn.Module) -> bool:
    return any(isinstance(child, MoE) for child in layer.children())
