"""The model that transformers would have in place of one with swapped layers: its names, on the meta device.

It is made from the model itself and not by its class, whose constructor may take more than a config: classifiers,
reward models, bare models and users' subclasses all have their names.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.integrations.transformers.origin import origin_of
from moesaic.layers.lora import ExpertsAdapter, RouterAdapter

# What a module has of these is its own, and belongs to no copy.
_HOOKS = [name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict)]


def plain_on_meta(model: Any, *, without_adapters: bool = False) -> Any:
    """A model with the original blocks in place of swapped layers, on the meta device. It may be parallelized.

    Its config is as files have it. It has no hooks, and none of the methods that were set on ``model`` alone. With
    ``without_adapters`` the model may have adapters, the result has none, and what is in it may be changed.

    Raises:
        ValueError: ``model`` is no model of transformers, or has adapters.
    """
    _check(model, without_adapters)
    plain = _plain(model, {}, {})
    if without_adapters:
        for name in [name for name, module in model.named_modules() if origin_of(module)]:
            # The layers keep the blocks that are in it.
            path = name_without_wrappers(f"{name}.").removesuffix(".")
            plain.set_submodule(path, copy.deepcopy(plain.get_submodule(path)))
    # As in a new model: weights that the config ties may have turned out to differ when they were loaded.
    plain.all_tied_weights_keys = plain.get_expanded_tied_weights_keys(all_submodels=True)
    plain.config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    plain.config.architectures = [type(plain).__name__]
    return plain


def class_of(module: nn.Module) -> Any:
    """The class of a module. FSDP gives a module a class that is derived from it."""
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into a model."""
    # Not by peft_config, which a model keeps when its adapters are merged.
    return any(
        (hasattr(module, "base_layer") and not _is_empty_wrapper(module))
        or hasattr(module, "modules_to_save")
        or isinstance(module, ExpertsAdapter | RouterAdapter)
        for module in model.modules()
    )


def name_without_wrappers(name: str) -> str:
    """The name of a parameter in a model without adapters."""
    return name.replace(".base_layer.", ".")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name is one of an adapter: ours, or peft's."""
    return ".adapters." in name or ".lora_" in name


def _is_empty_wrapper(module: nn.Module) -> bool:
    """Whether it is a layer of peft whose factors were merged in a parallelized model."""
    return getattr(module, "lora_A", None) is not None and not len(module.lora_A)  # type: ignore[arg-type]


def _check(model: nn.Module, without_adapters: bool) -> None:
    if has_adapters(model) and not without_adapters:
        raise ValueError(
            f"model: {type(model).__name__} has adapters, for which the files of transformers have no names; merge "
            "them before, by merge_adapters() or, of a PeftModel, merge_and_unload(); or save the adapters alone, by "
            "save_adapters() or the PeftModel's save_pretrained()"
        )
    if not isinstance(model, PreTrainedModel):
        inside = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
        remedy = f"export the one in it, model.{inside[0]}" if inside else "give the model that swap_moe changed"
        raise ValueError(f"model: {type(model).__name__} is no model of transformers; {remedy}")


def _plain(module: Any, known: dict[Tensor, Any], configs: dict[int, Any]) -> Any:
    if (origin := origin_of(module)) is not None:
        return origin.block
    if hasattr(module, "base_layer"):
        return _plain(module.base_layer, known, configs)
    cls = class_of(module)
    plain = cls.__new__(cls)
    own = {name: value for name, value in vars(module).items() if not callable(value)}
    for name, value in own.items():
        # Models in models share their configs, and their copies do, too.
        plain.__dict__[name] = copy.deepcopy(value, configs) if isinstance(value, PreTrainedConfig) else value
    plain.__dict__.update({name: OrderedDict() for name in _HOOKS if name in own})
    plain._parameters = {name: _on_meta(tensor, known) for name, tensor in module._parameters.items()}
    plain._buffers = {name: _on_meta(tensor, known) for name, tensor in module._buffers.items()}
    plain._modules = {
        name: None if child is None else _plain(child, known, configs) for name, child in module._modules.items()
    }
    return plain


def _on_meta(tensor: Tensor | None, known: dict[Tensor, Any]) -> Any:
    """Tied weights stay tied."""
    if tensor is not None and tensor not in known:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        known[tensor] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return tensor if tensor is None else known[tensor]
