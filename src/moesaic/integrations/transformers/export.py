"""The state of a model with swapped layers, with the names and layouts of transformers."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.integrations.transformers.origin import Origin, origin_of
from moesaic.layers import MoE
from moesaic.layers.packed import PackedWeight


@torch.no_grad()
def to_transformers_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The whole state of a model with swapped layers, with the names and layouts of transformers, on the CPU.

    Collective: every process calls it, and DTensors are gathered one by one. A process with ``keep=False`` takes part,
    but gets an empty state.

    Raises:
        ValueError: :func:`swap_moe` did not make one of the layers, or its experts are quantised; the message names it.
    """
    return original_state(model, model.state_dict(), keep)


def original_state(model: nn.Module, ours: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """A state of the model, or one with the same names and shapes, in the original names and layouts."""
    check_not_quantised(model)
    origins = origins_of(model)
    ours = dict(ours)
    state: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        if keep:
            state[name] = tensor.detach().cpu().contiguous()

    for prefix, origin in origins.items():
        if lacking := [name for link in origin.links for name in link.ours if prefix + name not in ours]:
            raise ValueError(
                f"model: the layer '{prefix[:-1]}' has no {lacking}; if adapters wrap its experts, merge them first "
                "(of peft: merge_and_unload())"
            )
        theirs = origin.block.state_dict()
        for link in origin.links:
            tensor = link.join(*(_whole(ours.pop(prefix + name)) for name in link.ours))
            # The layer keeps a router's bias in fp32, whatever the model has.
            put(prefix + link.theirs, tensor.to(theirs[link.theirs].dtype) if link.is_bias else tensor)
    for name, tensor in ours.items():
        put(name, _whole(tensor))
    return state


def check_not_quantised(model: nn.Module) -> None:
    """Raise ``ValueError`` if experts are quantised: blocks of transformers have no place for them."""
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            raise ValueError(
                f"model: '{name}' is quantised to {module.format}, and cannot be written in the layout of "
                "transformers; keep the files that it was made from, and save adapters by themselves"
            )


def origins_of(model: nn.Module) -> dict[str, Origin]:
    """The origins of all swapped layers, by the prefix of the layer's tensors.

    Raises:
        ValueError: :func:`swap_moe` did not make one of the layers; the message names it.
    """
    origins = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, MoE):
            continue
        origin = origin_of(layer)
        if origin is None:
            raise ValueError(
                f"model: swap_moe did not make the layer '{name}', so transformers has no names for its tensors; "
                "export only models whose layers swap_moe has made"
            )
        origins[f"{name}." if name else ""] = origin
    return origins


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
