"""Bring padding to the layers of a model: from ``attention_mask`` to ``MoE.forward(x, token_mask=...)``.

The first of these that is given says what is padding:

1. ``model(..., token_mask=)``, ``[B, S]``: padding is False or 0.
2. ``attention_mask``, ``[B, S]``: padding is 0. Masks of other shapes say which tokens see which, not what is padding.
3. ``labels`` of a causal language model: padding is the end of a row where every token is ``pad_token_id`` and every
   label is -100. A label of -100 alone does not mean padding, because prompts have it too.

Decoder layers call their MoE with hidden states only. So the mask goes to them as an argument, ``token_mask``, and each
layer adds it to the call of its own MoE. Since it is an argument, it is there again when activation checkpointing runs
a layer or a MoE again, whoever does the checkpointing.
"""

import contextlib
import functools
from typing import Any

from torch import Tensor, nn

from moesaic.integrations.transformers import hooks
from moesaic.integrations.transformers.calls import bind, models_with_labels, stacks_of
from moesaic.integrations.transformers.router_logits import wants_router_logits
from moesaic.layers import MoE

# The label that transformers ignores.
_IGNORED = -100


def install(model: nn.Module) -> None:
    """Make the decoders of a model, and their layers, bring masks to their MoEs."""
    for inner in models_with_labels(model):
        inner.register_forward_pre_hook(_take_labels, with_kwargs=True)
    for decoder, layers in stacks_of(model):
        decoder.register_forward_pre_hook(_take_attention_mask, with_kwargs=True)
        for layer in layers:
            layer.__class__ = _taking_masks(type(layer))


def remove(model: nn.Module) -> None:
    """Undo :func:`install`."""
    hooks.take_off(model, lambda hook: hook in _HOOKS)
    for module in model.modules():
        if (plain := vars(type(module)).get("_without_masks")) is not None:
            module.__class__ = plain


def _take_labels(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = bind(model, args, kwargs).arguments
    ids, labels = given.get("input_ids"), given.get("labels")
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if kwargs.get("token_mask") is not None or given.get("attention_mask") is not None:
        return args, kwargs
    if ids is None or labels is None or pad is None or model.loss_type != "ForCausalLM" or labels.shape != ids.shape:
        return args, kwargs
    if wants_router_logits(model, args, kwargs):
        # Plain transformers' balance loss knows attention masks only.
        return args, kwargs
    may_be = (ids == pad) & (labels.to(ids.device) == _IGNORED)
    return args, {**kwargs, "token_mask": may_be.long().flip(1).cumprod(1).flip(1) == 0}


def _take_attention_mask(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("token_mask") is not None:
        return args, kwargs
    given = bind(decoder, args, kwargs).arguments
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    mask = given.get("attention_mask")
    if tokens is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return args, kwargs
    # With a cache the mask also covers the tokens before these.
    return args, {**kwargs, "token_mask": mask[:, -tokens.shape[1] :] != 0}


@functools.cache
def _taking_masks(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a decoder layer, with an argument ``token_mask`` for the MoEs in it.

    It is a class and not a hook of the layer, because transformers runs hooks outside of activation checkpointing.
    """

    def forward(self: nn.Module, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Any:
        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "token_mask": token_mask}

        with contextlib.ExitStack() as giving:
            # Not on the MoE: what a user has put around it, such as a checkpoint, has to see the argument too.
            for child in self.children() if token_mask is not None else ():
                if any(isinstance(module, MoE) for module in child.modules()):
                    giving.enter_context(child.register_forward_pre_hook(give, with_kwargs=True))
            return plain.forward(self, *args, **kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # pickle finds classes by their names, and under this one it would find the plain one.
        if type(self) is masked:
            return _empty, (plain,), self.__dict__
        return plain.__reduce_ex__(self, protocol)

    functools.update_wrapper(forward, plain.forward)
    # Trainers, plans and policies recognise layers by the names of their classes.
    own = {"forward": forward, "_without_masks": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    own |= {"__qualname__": plain.__qualname__, "__reduce_ex__": reduce_ex}
    masked = type(plain.__name__, (plain,), own)
    return masked


def _empty(plain: type[nn.Module]) -> nn.Module:
    masked = _taking_masks(plain)
    return masked.__new__(masked)


_HOOKS = (_take_labels, _take_attention_mask)
