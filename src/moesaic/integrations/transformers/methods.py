"""What a model with swapped layers does in place of two of its own methods, so that checkpoints stay transformers' own.

They are set on the model, not on its class, and :func:`remove` takes them off.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moesaic.integrations.transformers.export import architecture_of, original_state, plain_model
from moesaic.integrations.transformers.origin import origin_of


def install(model: PreTrainedModel) -> None:
    """Let the model write, and take, checkpoints as transformers has them."""
    for method in _METHODS:
        setattr(model, method.__name__, MethodType(method, model))
    model.register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Undo :func:`install`, on the model and on models within."""
    for module in model.modules():
        for method in _METHODS:
            if getattr(module.__dict__.get(method.__name__), "__func__", None) is method:
                delattr(module, method.__name__)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _refuse_router_logits]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def _refuse_router_logits(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_router_logits"):
        raise ValueError(
            "output_router_logits: the blocks that give them are replaced; leave it out, and use swap_moe's "
            "aux_loss_coef with moesaic.balance_losses()"
        )


def save_pretrained(
    model: Any, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **arguments: Any
) -> None:
    """As the model's own, in the original names and layouts.

    Raises:
        ValueError: the model is parallelized.
    """
    state = model.state_dict() if state_dict is None else state_dict
    placed = next((name for name, tensor in state.items() if isinstance(tensor, DTensor)), None)
    if placed is not None:
        raise ValueError(f"model: '{placed}' is a DTensor; export_pretrained(model, path) writes it, on every rank")
    plain_model(model, original_state(model, state)).save_pretrained(save_directory, **arguments)


def load_state_dict(model: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """As the model's own, which takes our names and the original ones; and names as they are in files on disk too.

    There many families have a tensor for each expert. transformers converts them in ``from_pretrained``, but its
    ``Trainer`` resumes by ``load_state_dict`` and would leave the experts as they are.
    """
    state = dict(state_dict)
    if not state.keys() <= _names(model):
        state = _from_disk(model, state)
    return type(model).load_state_dict(model, state, strict=strict, assign=assign)


def _names(model: nn.Module) -> set[str]:
    """Ours and the original ones."""
    names = set(model.state_dict())
    for prefix, module in model.named_modules():
        if (origin := origin_of(module)) is not None:
            names |= {f"{prefix}.{link.theirs}" for link in origin.links}
    return names


def _from_disk(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of the tensors of a file, and those that it does not know as they are."""
    plain, info = architecture_of(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=state, dtype=model.dtype, output_loading_info=True
    )
    loaded = {name: tensor for name, tensor in plain.state_dict().items() if name not in info["missing_keys"]}
    return loaded | {name: state.get(name) for name in info["unexpected_keys"]}


_METHODS = (save_pretrained, load_state_dict)
