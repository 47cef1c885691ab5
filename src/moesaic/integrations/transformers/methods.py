"""Two methods that a model with swapped layers gets in place of its own, so that its checkpoints do not change.

The methods are set on the model, not on its class. :func:`remove` takes them off again.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moesaic.integrations.transformers import ties
from moesaic.integrations.transformers.export import original_state
from moesaic.integrations.transformers.origin import origin_of
from moesaic.integrations.transformers.plain import class_of, has_adapters, plain_on_meta


def install(model: nn.Module) -> None:
    """Make the models of transformers in it write and read checkpoints with the original names and layouts.

    A wrapper around them, such as peft's, keeps methods of its own: its files have the adapters alone.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(map(origin_of, module.modules())):
            for method in _METHODS:
                setattr(module, method.__name__, MethodType(method, module))


def check_names(model: nn.Module) -> None:
    """Raise ``ValueError`` if a model, whose blocks are still there, could not be saved. Reads no number."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not has_adapters(model):
            try:
                revert_weight_conversion(module, {name: t.to("meta") for name, t in module.state_dict().items()})
            except Exception as error:
                raise ValueError(
                    f"model: transformers cannot make the names of the files of {type(module).__name__}, so it could "
                    f"not be saved: {type(error).__name__}: {error}"
                ) from error
            return


def remove(model: nn.Module) -> None:
    """Undo :func:`install` on the model and on models inside it."""
    for module in model.modules():
        for method in _METHODS:
            if getattr(module.__dict__.get(method.__name__), "__func__", None) is method:
                delattr(module, method.__name__)


def save_pretrained(
    model: Any, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **arguments: Any
) -> None:
    """Save as the model's own method does, with the original names and layouts. Of adapters, only those.

    Raises:
        ValueError: the model is parallelized, or has adapters that transformers does not know of.
    """
    state = model.state_dict() if state_dict is None else state_dict
    placed = next((name for name, tensor in state.items() if isinstance(tensor, DTensor)), None)
    if placed is not None:
        raise ValueError(f"model: '{placed}' is a DTensor; call export_pretrained(model, path) on every rank")
    writer = model
    if not getattr(model, "_hf_peft_config_loaded", False):
        writer, state = plain_on_meta(model), original_state(model, state)
        ties.tie_what_is_one(writer, model.state_dict(keep_vars=True))
    type(writer).save_pretrained(writer, save_directory, state_dict=state, **arguments)


def load_state_dict(model: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Load as the model's own method does. Our names, the original names, and the names in files are all accepted.

    In the files of many families each expert has a tensor of its own. transformers converts them in
    ``from_pretrained``. But its ``Trainer`` resumes with ``load_state_dict``, which would not change the experts.
    """
    state = dict(state_dict)
    if not state.keys() <= _names(model):
        state = _from_disk(model, state)
    return type(model).load_state_dict(model, state, strict=strict, assign=assign)


def _names(model: nn.Module) -> set[str]:
    """Our names and the original ones."""
    names = set(model.state_dict())
    for prefix, module in model.named_modules():
        if (origin := origin_of(module)) is not None:
            names |= {f"{prefix}.{link.theirs}" for link in origin.links}
    return names


def _from_disk(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a file as transformers converts them. Those that it does not know stay as they are."""
    plain, info = class_of(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=state, dtype=model.dtype, output_loading_info=True
    )
    loaded = {name: tensor for name, tensor in plain.state_dict().items() if name not in info["missing_keys"]}
    return loaded | {name: state.get(name) for name in info["unexpected_keys"]}


_METHODS = (save_pretrained, load_state_dict)
