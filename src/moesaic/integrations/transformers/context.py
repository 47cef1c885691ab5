"""Attention of transformers' decoders under context parallelism: its rank's queries, and keys and values of all ranks.

transformers asks a table which function computes attention, by ``config._attn_implementation``, and another one which
function makes masks. Ours gather keys and values, and give each chunk of queries to the function that the model had:
``"sdpa"`` or ``"eager"``. So scaling, grouped queries, latent attention, sinks and dropout stay those of the model.
Masks are made by transformers, too, of whole sequences: of windows, of chunks, of several documents in a row, and of
padding.

A chunk of queries that begins at ``a`` and ends at ``b`` meets the keys before ``b``, for attention is causal, and of a
window no keys before those of its first query.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moesaic.integrations.transformers.calls import stacks_of
from moesaic.parallel.adapted import base_of
from moesaic.parallel.context import PartMask, part_of_call
from moesaic.parallel.decoder import decoder_layers, works_on_tokens

# What computes a chunk -> the name under which transformers finds ours.
_NAMES = {inner: f"moesaic_context_parallel_{inner}" for inner in ("sdpa", "eager")}
# What attention is given, which is of a part, or not of positions.
_KNOWN_ARGUMENTS = frozenset(
    {
        *("self", "hidden_states", "position_embeddings", "position_ids"),
        *("attention_mask", "past_key_values", "use_cache", "output_attentions"),
    }
)
_INNER = {name: inner for inner, name in _NAMES.items()}


class ContextParallelism:
    """What :func:`moesaic.parallelize` needs to know of a decoder's attention to lay it over cp."""

    def check(self, decoder: Any) -> None:
        chosen = _inner_of(decoder.config)
        if chosen not in _NAMES:
            raise ValueError(
                f"cp: attention is computed by {chosen!r}, which cp > 1 does not know; call "
                "model.set_attn_implementation('sdpa') before parallelize (or 'eager'), or use cp=1"
            )
        if not getattr(decoder.config, "is_causal", True):
            raise ValueError("cp: the attention of this model is not causal (config.is_causal); use cp=1")
        for i, layer in enumerate(decoder_layers(decoder)):
            attention = layer.self_attn
            if problem := _problem_of(attention, chosen):
                raise ValueError(f"cp: layer {i}'s attention, {type(attention).__name__}, {problem}; use cp=1")

    def take_over(self, decoder: Any) -> None:
        _register()
        name = _NAMES[_inner_of(decoder.config)]
        decoder.config._attn_implementation = name
        for layer in decoder_layers(decoder):
            layer.self_attn.config._attn_implementation = name
            layer.self_attn.computes_a_part = True

    def check_call(self, decoder: Any) -> None:
        if (chosen := decoder.config._attn_implementation) not in _INNER:
            raise ValueError(
                f"attn_implementation: it became {chosen!r} after parallelize, which knows nothing of the other parts "
                "of the sequence; call set_attn_implementation before parallelize"
            )


def install(model: nn.Module) -> None:
    """Let the decoders of a model say how their attention computes with a part of the queries."""
    for decoder, _ in stacks_of(model):
        decoder.attention_of_parts = ContextParallelism()  # type: ignore[assignment]


def remove(model: nn.Module) -> None:
    """Undo :func:`install`."""
    for decoder, _ in stacks_of(model):
        if "attention_of_parts" in vars(decoder):
            del decoder.attention_of_parts


def _inner_of(config: Any) -> str:
    """What computes attention. Another model of the same config may be laid over cp already."""
    return _INNER.get(config._attn_implementation, config._attn_implementation)


def _problem_of(attention: Any, chosen: str) -> str | None:
    """Why an attention cannot be computed with a part of the queries, if so."""
    function = inspect.unwrap(type(attention).forward)
    names = set(function.__code__.co_names)
    if "ALL_ATTENTION_FUNCTIONS" not in names:
        return "does not let transformers choose what computes it, so it would see its rank's tokens only"
    if "arange" in names and not _has_no_positions_of_its_own(attention):
        return (
            "counts positions itself (attn_temperature_tuning), so it would take its rank's tokens for the first of "
            "each sequence"
        )
    named = {n for n, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    if unknown := sorted(named - _KNOWN_ARGUMENTS):
        return f"is given {unknown[0]!r} beside hidden states, which may be of whole sequences"
    for name, child in attention.named_children():
        if not isinstance(base_of(child), nn.Linear) and any(True for _ in child.children()):
            return f"has a part, '{name}' ({type(child).__name__}), that may look at other tokens"
        if not works_on_tokens(child):
            return f"has a part, '{name}' ({type(child).__name__}), that does not treat each token alone"
    if not getattr(attention, "is_causal", True):
        return "is not causal"
    if chosen == "eager" and "eager_attention_forward" not in function.__globals__:
        return "has no eager_attention_forward; call model.set_attn_implementation('sdpa') before parallelize"
    return None


def _has_no_positions_of_its_own(attention: Any) -> bool:
    """Of Llama 4: only layers without rotary embedding count, and only if their temperature is tuned."""
    return bool(getattr(attention, "use_rope", False)) or not getattr(attention, "attn_temperature_tuning", True)


def _register() -> None:
    for inner, name in _NAMES.items():
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attend, inner))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(_mask, ALL_MASK_ATTENTION_FUNCTIONS[inner], inner))


def _mask(whole: Callable[..., Any], inner: str, **given: Any) -> Any:
    """The masks of this rank's chunks of queries, made by transformers' own function for ``inner``."""
    part = part_of_call()
    if part is None:  # another model of the same config
        return whole(**given)
    padding, reach = given["attention_mask"], given.get("local_size")
    if padding is not None and bool(padding.all()):
        padding = given["attention_mask"] = None
    plain = given.get("allow_is_causal_skip", True) and padding is None and (reach is None or part.length < reach)
    masks: list[tuple[slice, Any]] = []
    for chunk in part.chunks:
        queries, keys = chunk.stop - chunk.start, slice(0, chunk.stop)
        if padding is not None and inner == "eager":
            # Where every key of a query is padding, "eager" gives it the mean of all keys. So it has to have them all.
            keys = slice(0, part.length)
        elif reach is not None and not given.get("use_vmap"):
            # Of a window, or of chunks: no query reaches further back. (With a function of the user's own one may.)
            keys = slice(max(0, chunk.start - reach + 1), chunk.stop)
        if queries == 0 or (plain and inner == "sdpa" and chunk.start == 0):
            mask = None
        elif plain and inner == "sdpa":
            # Known to torch's fast kernels, for which nothing is made in memory.
            mask = causal_lower_right(queries, chunk.stop)
        else:
            own = {"q_length": queries, "q_offset": chunk.start}
            own |= {"kv_length": keys.stop - keys.start, "kv_offset": keys.start}
            mask = whole(**{**given, **own, "allow_is_causal_skip": False})
        masks.append((keys, mask))
    return PartMask(part, tuple(masks))


def _attend(
    inner: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of this rank's queries ``[B, H, s, .]`` to the keys and values of all ranks."""
    compute: Any = ALL_ATTENTION_FUNCTIONS.get(inner) or _eager(module)
    if not isinstance(attention_mask, PartMask):
        if getattr(module, "computes_a_part", False):
            raise ValueError(
                f"cp: {type(module).__name__} was given no mask that transformers' functions (create_causal_mask) made "
                "in a call of the decoder, so its rank's tokens would see no others; call the whole decoder, or use "
                "cp=1"
            )
        return compute(module, query, key, value, attention_mask, **given)
    part = attention_mask.part
    query, key, value = (_as_autocast(t) for t in (query, key, value))
    if part.is_empty:
        # One row stands for none. What it gives is cut off, and keeps gradients of nothing in step with other ranks.
        key, value = part.gather([key[:, :, :0], value[:, :, :0]])
        return compute(module, query, key[:, :, :1], value[:, :, :1], None, **given)
    key, value = part.gather([key, value])
    results = []
    for queries, (keys, mask) in zip(query.split(part.sizes, 2), attention_mask.of_chunks, strict=True):
        if queries.shape[2] == 0:
            continue
        results.append(compute(module, queries, key[:, :, keys], value[:, :, keys], mask, **given)[0])
    return torch.cat(results, 1), None


def _as_autocast(t: Tensor) -> Tensor:
    """In the dtype to which autocast would cast it: before it is sent, and for what autocast does not see."""
    device = t.device.type
    if t.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return t
    return t.to(torch.get_autocast_dtype(device))


def _eager(module: nn.Module) -> Any:
    """The function that the file of an attention has for it."""
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
