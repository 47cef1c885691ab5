"""Activation checkpointing of a plan: what the forward pass keeps, and what the backward pass computes again.

``torch.utils.checkpoint`` does it, around parts of the model that the plan knows. Gradients are the same bits wherever
kernels are deterministic, for the operators of the second forward pass are those of the first.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moesaic.layers import MoE

Recompute = Literal["none", "full", "selective", "experts"]

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
# What takes long: the products of dense weights, and attention. With the experts that have been chosen, whose number
# decides how much is sent, and which cost next to nothing.
_SAVED_OPS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
        _aten.topk.default,
    }
)
# The exchanges of tokens, here and back.
_EXCHANGES = frozenset(
    {_c10d.all_to_all_single.default, _c10d.all_reduce.default, _c10d.all_gather_into_tensor.default}
)


def check_recompute(recompute: Any, model: nn.Module) -> None:
    """Raise ``ValueError`` unless it is one of the ways, and nobody else computes parts of the model again."""
    ways = get_args(Recompute)
    if recompute not in ways:
        raise ValueError(f"recompute: got {recompute!r}; choose one of {', '.join(map(repr, ways))}")
    if recompute == "none":
        return
    taken = next((name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)), None)
    if taken is not None:
        raise ValueError(
            f"recompute: gradient checkpointing of transformers is on in '{taken}', so that parts would be computed "
            "twice more; call model.gradient_checkpointing_disable(), or leave recompute out"
        )


def add_recomputation(
    recompute: Recompute, blocks: Sequence[nn.Module], moes: Iterable[MoE], dense_groups: Collection[str]
) -> None:
    """Let the backward pass compute again what the forward pass of ``blocks``, or of the experts, does not keep.

    Args:
        recompute: how much; see :func:`moesaic.parallelize`.
        blocks: decoder layers, and MoE layers that are in none.
        dense_groups: names of the groups over which a sequence is gathered, once for each layer. What they bring would
            be whole sequences to keep.
    """
    if recompute == "experts":
        for moe in moes:
            moe.recompute_experts = True
    elif recompute != "none":
        options: dict[str, Any] = {}
        if recompute == "selective":
            policy = partial(_policy, frozenset(dense_groups))
            options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
        for block in blocks:
            # Not around the call: what FSDP gathers for a layer is there when its backward pass begins.
            block.forward = partial(_recomputed, block.forward, options)


def _policy(dense_groups: frozenset[str], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saves = op in _SAVED_OPS or (op in _EXCHANGES and args[-1] not in dense_groups)
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if kwargs.get("past_key_values") is not None:
        # The second forward pass would put its keys and values into the cache once more.
        warnings.warn("recompute: no cache is kept in forward passes with gradients; use_cache=False", stacklevel=2)
        kwargs["past_key_values"] = None
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)
