"""Models on the meta device: shapes and placements before there is memory."""

import torch
from torch import Tensor, nn

from moesaic.layers import reset_expert_load


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
