"""Which tensors of a checkpoint's files are which of a transformers model: by transformers' own conversion mapping.

Renamed, put together and transposed as ``from_pretrained`` does, but lazily: see :class:`LazyTensor`. Every name is
accounted for before a number is read.
"""

from __future__ import annotations

import copy
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

from moesaic.integrations.transformers.lazy import LazyTensor


def to_model_names(model: Any, tensors: Mapping[str, LazyTensor], *, cast: bool = False) -> dict[str, LazyTensor]:
    """The whole state of ``model``, a model of transformers on whatever device, from tensors named as in files.

    With ``cast`` each tensor is cast to the model's dtype before it is put together with others, as transformers does.

    Of tied parameters those are in the result that the files have, one at least.

    Raises:
        ValueError: names that the model has and the files have not, names of the files that it has no place for, and
            shapes or kinds of numbers that differ, all of them listed. Names that transformers ignores are ignored,
            but for parameters that are missing.
        NotImplementedError: a conversion that cannot be done lazily, with its name.
    """
    wanted = model.state_dict()
    state, unexpected = _converted(model, tensors, wanted, cast)
    # transformers leaves an old place of rotary frequencies and positions out for all models.
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
        f"{name} is {list(tensor.shape)} {tensor.dtype} and not {list(wanted[name].shape)} {wanted[name].dtype}"
        for name, tensor in state.items()
        if tensor.shape != wanted[name].shape or _is_of_another_kind(tensor, wanted[name])
    ]
    problems = {"missing": missing, "unexpected": unexpected, "different": differing}
    if any(problems.values()):
        text = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the files do not hold a {type(model).__name__} of this config. {text}")
    return state


def twins(model: Any, name: str) -> set[str]:
    """The parameters that one is tied to."""
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
            raise NotImplementedError(f"{operations} of {names}, which gives '{target}': {error}") from error
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"'{target}' cannot be made of {names}: {error}") from error
        for name, tensor in found.items():
            state[name] = tensor[0] if isinstance(tensor, list) else tensor
    return {n: t for n, t in state.items() if n in wanted}, unexpected + [n for n in state if n not in wanted]


def _is_of_another_kind(tensor: LazyTensor, wanted: Any) -> bool:
    """Whether a cast would be no rounding: of quantized numbers, or from integers."""
    is_quantized = tensor.dtype.itemsize < 2 <= wanted.dtype.itemsize
    return is_quantized or tensor.dtype.is_floating_point != wanted.dtype.is_floating_point


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
