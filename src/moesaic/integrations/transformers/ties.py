"""Weights that are tied by a model's config, and whether they are tied in fact.

A config that says ``tie_word_embeddings`` can stand beside an output layer that is not the embedding: a merged adapter,
or a model that was changed by hand, leaves such checkpoints. And weights that the config leaves apart can be one
parameter. The numbers decide, as in ``from_pretrained``: weights are tied that are one tensor, or have equal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moesaic.integrations.transformers.lazy import LazyTensor, equal_bits

# Numbers are compared in blocks of rows of at most this many.
_BLOCK = 2**24


def differing(model: Any, state: Mapping[str, LazyTensor]) -> list[str]:
    """The weights in ``state`` that are tied by the config, but have other numbers than what they are tied to.

    Reads the numbers of both, in blocks, unless both are one tensor. Parts on the meta device count as equal.
    """
    pairs = model.all_tied_weights_keys.items()
    return [name for name, source in pairs if {name, source} <= state.keys() and not _equal(state[name], state[source])]


def untie(model: Any, names: list[str]) -> None:
    """Give each of these weights of a model on the meta device a parameter of its own.

    The config then says so too, unless other weights stay tied.
    """
    for name in names:
        del model.all_tied_weights_keys[name]
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, leaf, nn.Parameter(torch.empty_like(getattr(owner, leaf))))
    if names and not model.all_tied_weights_keys:
        _set_config(model, False)


def tie_what_is_one(model: Any, state: Mapping[str, Any]) -> None:
    """Make the config say that weights are tied, where the architecture can tie them and each of them is one tensor."""
    if model.all_tied_weights_keys:
        return
    before = _set_config(model, True)
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    if ties and all(
        {name, source} <= state.keys() and is_one(state[name], state[source]) for name, source in ties.items()
    ):
        model.tie_weights()
        model.all_tied_weights_keys = ties
    else:
        for config, value in before:
            config.tie_word_embeddings = value


def without_copies(model: Any, state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The state with tied weights only once, under the name that the others are tied to."""
    kept = dict(state)
    for name, source in model.all_tied_weights_keys.items():
        if name in kept:
            tensor = kept.pop(name)
            kept.setdefault(source, tensor)
    return kept


def with_copies(model: Any, state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The state with tied weights under all of their names."""
    whole = dict(without_copies(model, state))
    return whole | {name: whole[source] for name, source in model.all_tied_weights_keys.items()}


def is_one(a: Any, b: Any) -> bool:
    """Whether two tensors are the same one, or views of the same numbers."""
    if a is b:
        return True
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        return a.device_mesh == b.device_mesh and a.placements == b.placements and is_one(a.to_local(), b.to_local())
    places = [(t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return places[0] == places[1] and a.data_ptr() != 0


def _set_config(model: Any, value: bool) -> list[tuple[Any, Any]]:
    """Set ``tie_word_embeddings`` in all configs of a model that have it, and return what was there."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(c, c.tie_word_embeddings) for c in configs.values() if hasattr(c, "tie_word_embeddings")]
    for config, _ in before:
        config.tie_word_embeddings = value
    return before


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    width = max(1, a.shape[1:].numel())
    step = max(1, _BLOCK // width)
    equal = True
    for start in range(0, a.shape[0], step):
        rows = (slice(start, min(start + step, a.shape[0])), *(slice(0, size) for size in a.shape[1:]))
        x, y = a.read(rows), b.read(rows)
        # All blocks are read, also after a difference: on ranks every read is collective.
        equal = equal and (x.is_meta or equal_bits(x, y))
    return equal
