"""From the tensors of a checkpoint's files to those of a transformers model, by transformers' own conversion mapping.

Tensors are renamed, concatenated and transposed as in ``from_pretrained``, but lazily: see :class:`LazyTensor`. All
names are checked before a number is read.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moesaic import ranks
from moesaic.integrations.transformers.folding import fold
from moesaic.integrations.transformers.lazy import LazyTensor

_log = logging.getLogger(__name__)


def to_model_names(
    model: Any, tensors: Mapping[str, LazyTensor], *, cast: bool = False, ignore_unexpected: bool = False
) -> dict[str, LazyTensor]:
    """The whole state of ``model``, from tensors with the names of files. The model may be on any device.

    With ``cast`` each tensor is cast to the model's dtype before it is concatenated with others, as transformers does.
    With ``ignore_unexpected`` tensors that the model does not have are left out. A warning on rank 0 counts them.

    Of tied parameters the result has those that the files have, at least one.

    Raises:
        ValueError: the files do not fit the model. The message lists the names that the files lack, the names that the
            model does not have, and the shapes and kinds of dtypes that differ. Names that transformers ignores are
            ignored here too, except missing parameters.
        NotImplementedError: a conversion cannot be done lazily; the message names it.
    """
    wanted = model.state_dict()
    state, unexpected = _converted(model, tensors, wanted, cast)
    # transformers ignores the old names of rotary frequencies and positions in all models.
    buffers = [name for name, _ in model.named_buffers()]
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    old_places = ("rotary_emb.inv_freq", "position_ids")
    ignored |= {rf"{place}$" for place in old_places if any(name.endswith(place) for name in buffers)}
    unexpected = [name for name in unexpected if not _matches(ignored, name)]
    missing = [
        name
        for name in wanted
        if name not in state
        and not (name in buffers and _matches(model._keys_to_ignore_on_load_missing or (), name))
        and not any(twin in state for twin in twins(model, name))
    ]
    differing = [
        f"{name} is {list(tensor.shape)} {tensor.dtype}, not {list(wanted[name].shape)} {wanted[name].dtype}"
        for name, tensor in state.items()
        if tensor.shape != wanted[name].shape or _is_of_another_kind(tensor, wanted[name])
    ]
    # The names of files need not be those of the model.
    extra = fold(unexpected, {*wanted, *tensors} - set(unexpected))
    if unexpected and ignore_unexpected:
        if ranks.is_leader():
            _log.warning("ignored %d tensors that %s does not have: %s", len(unexpected), type(model).__name__, extra)
        unexpected = []
    problems = {
        "missing": ", ".join(missing),
        "unexpected": extra if unexpected else "",
        "different": ", ".join(differing),
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {names}" for kind, names in problems.items() if names)
        remedy = ". ignore_unexpected=True leaves out what the model does not have" if unexpected else ""
        raise ValueError(f"the files do not hold a {type(model).__name__} of this config. {text}{remedy}")
    return state


def twins(model: Any, name: str) -> set[str]:
    """The other parameters that a parameter is tied to."""
    tied = model.all_tied_weights_keys
    source = tied.get(name, name)
    return ({source} | {target for target, origin in tied.items() if origin == source}) - {name}


def _converted(
    model: Any, tensors: Mapping[str, LazyTensor], wanted: dict[str, Any], cast: bool
) -> tuple[dict[str, LazyTensor], list[str]]:
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix

    groups: dict[str, Any] = {}
    unexpected: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            unexpected.append(name)
            continue
        if target not in groups:
            groups[target] = WeightRenaming(name, target) if pattern is None else copy.deepcopy(by_pattern[pattern])
        elif pattern is None or not isinstance(groups[target], WeightConverter):
            raise ValueError(
                f"the files have '{target}' twice: {sorted([name, *groups[target].layer_targets[target]])}"
            )
        tensor = tensors[name]
        if cast and not _is_of_another_kind(tensor, wanted[target]):
            tensor = tensor.to(wanted[target].dtype)
        groups[target].add_tensor(target, name, name if pattern is None else pattern, tensor)

    state: dict[str, LazyTensor] = {}
    for target, group in groups.items():
        names = sorted(group.layer_targets[target])
        try:
            found = group.convert(target, model=model, config=model.config)
        except (NotImplementedError, AttributeError) as error:
            operations = ", ".join(type(o).__name__ for o in group.operations)
            raise NotImplementedError(f"'{target}' needs {operations} of {names}: {error}") from error
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"'{target}' cannot be made from {names}: {error}") from error
        for name, tensor in found.items():
            state[name] = tensor[0] if isinstance(tensor, list) else tensor
    return {n: t for n, t in state.items() if n in wanted}, unexpected + [n for n in state if n not in wanted]


def _is_of_another_kind(tensor: LazyTensor, wanted: Any) -> bool:
    """Whether a cast would be more than rounding: from quantized numbers, or between integers and floats."""
    is_quantized = tensor.dtype.itemsize < 2 <= wanted.dtype.itemsize
    return is_quantized or tensor.dtype.is_floating_point != wanted.dtype.is_floating_point


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
