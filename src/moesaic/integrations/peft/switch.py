"""Which of several adapters is active, or none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners import lora
from torch import nn

from moesaic.integrations.peft.targets import Target, targets_of
from moesaic.layers import GroupedExperts, TopKRouter
from moesaic.parallel.split import whole_of

_CONFIGS = "_moesaic_adapters"


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The configs of the adapters that :func:`add_adapters` has put into a model, by name."""
    return whole_of(model).__dict__.setdefault(_CONFIGS, {})


def config_of(model: nn.Module, name: str) -> Any:
    """The config of the adapters of this name.

    Raises:
        ValueError: there are none.
    """
    configs = configs_of(model)
    if name not in configs:
        known = f"it has {sorted(configs)}" if configs else "call add_adapters first"
        raise ValueError(f"name: the model has no adapters {name!r}; {known}")
    return configs[name]


def adapters_of(model: nn.Module, name: str) -> list[Target]:
    """The weights that have an adapter of this name."""
    return targets_of(model, config_of(model, name))[0]


def set_adapter(model: nn.Module, name: str) -> None:
    """Make the adapters of one name the active ones, which alone can be trained. All other parameters are frozen.

    Raises:
        ValueError: there are no adapters of this name.
    """
    config_of(model, name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers_of(model):
        if isinstance(layer, lora.LoraLayer):
            has = name in layer.lora_A
            layer.enable_adapters(has)
            if has:
                layer.set_adapter(name)
        elif layer.adapters is not None:
            layer.active_adapter = name if name in layer.adapters else None
            if layer.active_adapter is not None:
                layer.adapters[name].requires_grad_(True)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes without adapters.

    Example:
        >>> with disable_adapters(model), torch.no_grad():
        ...     logits = model(input_ids).logits  # of the base model
    """
    layers: list[tuple[Any, Any]] = []
    for layer in layers_of(model):
        if isinstance(layer, lora.LoraLayer):
            layers.append((layer, layer._disable_adapters))
            layer._disable_adapters = True
        else:
            layers.append((layer, layer.active_adapter))
            layer.active_adapter = None
    try:
        yield
    finally:
        for layer, before in layers:
            if isinstance(layer, lora.LoraLayer):
                layer._disable_adapters = before
            else:
                layer.active_adapter = before


def layers_of(model: nn.Module) -> list[Any]:
    """The modules that have adapters, or may have some."""
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer | GroupedExperts | TopKRouter)]
