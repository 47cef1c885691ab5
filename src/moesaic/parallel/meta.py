"""Models on the meta device: shapes and placements before there is memory."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.layers import reset_expert_load
from moesaic.layers.initial import reset_checked


def is_on_meta(model: nn.Module) -> bool:
    """Whether all parameters are on the meta device."""
    return all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device) -> None:
    """Give what is on the meta device memory on ``device``, in place: uninitialised, but for counts, which are zero.

    DTensors get their local shards. Tied parameters stay tied. What is not on the meta device stays as it is.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)

    def memory_for(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    model._apply(memory_for)
    for first, *others in names.values():
        for other in others:
            path, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(first))
    reset_expert_load(model)


def check_resets(model: nn.Module) -> None:
    """Let ``reset_parameters()`` of every module refuse to draw where each rank would draw alone."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(type(module), "reset_parameters"):
            module.reset_parameters = partial(reset_checked, module)


def refuse_offloaded(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model whose weights accelerate keeps elsewhere, with parameters on the meta device."""
    for name, module in model.named_modules():
        # This hook of accelerate brings the weights of its own module only, for one call.
        if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
            raise ValueError(
                f"model: accelerate has offloaded '{name}', so its weights are not in the model; load it without "
                "device_map and offloading. moesaic.integrations.transformers.load_pretrained(path, meshes) reads each "
                "rank's part only"
            )
