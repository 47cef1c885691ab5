"""The language models and decoders in a module: the module itself, or what it wraps.

A wrapper is any module around a language model: one of peft, a reward model of the user's own, or a shell that only
passes its arguments on. What is done to a language model is done to the one inside it.
"""

import inspect
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from moesaic.layers import MoE
from moesaic.parallel.decoder import Elsewhere, has_attention, leaves_shards_alone

_OTHER_PLANS = (DataParallel, DistributedDataParallel, FullyShardedDataParallel)


def language_models(model: nn.Module) -> list[Any]:
    """Every transformers model in a module that can make a loss of labels, and the outermost ones without labels."""
    found: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if not _is_language_model(module):
            continue
        if module not in inside or "labels" in inspect.signature(module.forward).parameters:
            found.append(module)
        inside |= set(module.modules())
    return found


def decoders(model: nn.Module) -> list[nn.Module]:
    """Every module in a module that has a list of decoder layers with MoEs in them. None is inside another.

    The MoEs may be on other stages of a pipeline.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if (
            module not in inside
            and has_attention(module)
            and any(isinstance(m, MoE | Elsewhere) for m in module.modules())
        ):
            found.append(module)
            inside |= set(module.modules())
    return found


def check_no_other_plan(model: nn.Module) -> None:
    """Raise ``ValueError`` if a module of torch already brings gradients of other ranks together."""
    for name, module in model.named_modules():
        if isinstance(module, _OTHER_PLANS):
            raise ValueError(
                f"model: {f'{name!r} ' if name else 'it '}is a {type(module).__name__}, which sums gradients over "
                "ranks itself; give parallelize the model inside (.module), and use its result without the wrapper"
            )


def check_whole_sequences(model: nn.Module, decoder: nn.Module, axis: str) -> None:
    """Raise ``ValueError`` unless everything around a decoder can do with what ``axis`` leaves of sequences."""
    holder = model
    while holder is not decoder and not _is_language_model(holder):
        inner = next(child for child in holder.children() if decoder in set(child.modules()))
        if len(set(holder.parameters())) > len(set(inner.parameters())):
            raise ValueError(
                f"model: {axis} > 1 works for causal language models, and for wrappers around them without parameters "
                f"of their own. {type(holder).__name__} has other parameters, which may expect whole sequences, and a "
                f"rank has only a part of each; use {axis}=1"
            )
        holder = inner
    if holder is not decoder and not leaves_shards_alone(holder, decoder):
        raise ValueError(
            f"model: {axis} > 1 works for causal language models. {type(holder).__name__} may expect hidden states of "
            f"whole sequences, and a rank has only a part of each; use {axis}=1"
        )


def _is_language_model(module: Any) -> bool:
    return hasattr(type(module), "loss_function")
