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

from moesaic.integrations.transformers.export import architecture_of, original_state, plain_model
from moesaic.integrations.transformers.origin import origin_of


def install(model: PreTrainedModel) -> None:
    """Make the model write and read checkpoints with the names and layouts of transformers."""
    for method in _METHODS:
        setattr(model, method.__name__, MethodType(method, model))


def remove(model: nn.Module) -> None:
    """Undo :func:`install` on the model and on models inside it."""
    for module in model.modules():
        for method in _METHODS:
            if getattr(module.__dict__.get(method.__name__), "__func__", None) is method:
                delattr(module, method.__name__)


def save_pretrained(
    model: Any, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **arguments: Any
) -> None:
    """Save as the model's own method does, with the original names and layouts.

    Raises:
        ValueError: the model is parallelized.
    """
    state = model.state_dict() if state_dict is None else state_dict
    placed = next((name for name, tensor in state.items() if isinstance(tensor, DTensor)), None)
    if placed is not None:
        raise ValueError(f"model: '{placed}' is a DTensor; call export_pretrained(model, path) on every rank")
    plain_model(model, original_state(model, state)).save_pretrained(save_directory, **arguments)


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
    plain, info = architecture_of(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=state, dtype=model.dtype, output_loading_info=True
    )
    loaded = {name: tensor for name, tensor in plain.state_dict().items() if name not in info["missing_keys"]}
    return loaded | {name: state.get(name) for name in info["unexpected_keys"]}


_METHODS = (save_pretrained, load_state_dict)
