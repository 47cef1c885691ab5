"""Losses that keep the load of experts balanced, and how they reach the training loop.

Legend: T tokens, E experts, K top-k.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LOSSES: ContextVar[list[Tensor] | None] = ContextVar("moesaic_balance_losses", default=None)


@contextlib.contextmanager
def balance_losses() -> Iterator[list[Tensor]]:
    """Collect the load-balancing and z-losses of every router called inside.

    Yields a list that fills up with scalars during the forward pass. Each is this process's *part* of its loss,
    normalised by the tokens of all processes: add them to this process's part of the main loss, and the sum over
    processes of gradients (and of losses) is that of the whole. Outside this context the losses are dropped.
    With gradient accumulation divide them by the number of forward passes: each is a mean over the tokens of its own.

    Example:
        >>> with moesaic.balance_losses() as losses:
        ...     out = model(x)
        >>> loss = main_loss(out) + sum(losses)
    """
    losses: list[Tensor] = []
    token = _LOSSES.set(losses)
    try:
        yield losses
    finally:
        _LOSSES.reset(token)


def record_loss(loss: Tensor) -> None:
    """Hand a loss to the enclosing :func:`balance_losses`, if there is one.

    Raises:
        RuntimeError: gradients are off, as in the first forward of reentrant activation checkpointing.
    """
    losses = _LOSSES.get()
    if losses is None or is_recomputing():
        return
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "balance_losses: a router in training mode ran without gradients, so its balance loss would have none. Use "
            "activation checkpointing with use_reentrant=False; evaluate in eval mode, or outside balance_losses()"
        )
    losses.append(loss)


def is_recomputing() -> bool:
    """Whether this forward is run again by activation checkpointing, inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def first_time(counts: Tensor) -> Tensor:
    """``counts``, or zeros where this forward is run again by activation checkpointing.

    In compiled code it is an operator: what is asked at the time of tracing would be the answer for ever.
    """
    if torch.compiler.is_compiling():
        return _first_time(counts)
    return torch.zeros_like(counts) if is_recomputing() else counts


# No sharding rule: counts are a rank's own.
@torch.library.custom_op("moesaic::first_time", mutates_args=())
def _first_time(counts: Tensor) -> Tensor:
    return torch.zeros_like(counts) if is_recomputing() else counts.clone()


@_first_time.register_fake
def _(counts: Tensor) -> Tensor:
    return torch.empty_like(counts)


def load_balancing_loss(
    scores: Float[Tensor, "T E"], total_counts: Int[Tensor, " E"], num_tokens: Int[Tensor, ""]
) -> Tensor:
    """This process's part of ``E * sum over e of f_e * P_e``; 1 for a uniform router over uniform loads.

    ``f_e`` is the share of all routed token copies that expert e got, without gradient; ``P_e`` the mean over all
    tokens of its score, scores normalised to sum 1 a token. From the Switch Transformer (arXiv 2101.03961), for top-k
    as in Megatron-Core.

    Args:
        scores: of this process's tokens.
        total_counts: routed token copies an expert, over all processes.
        num_tokens: tokens over all processes.
    """
    share_E = total_counts.to(scores.dtype) / total_counts.sum().clamp(min=1)
    probability_sum_E = (scores / scores.sum(1, keepdim=True).clamp(min=1e-20)).sum(0)
    return scores.shape[1] * (share_E * probability_sum_E).sum() / num_tokens


def router_z_loss(logits: Float[Tensor, "T E"], num_tokens: Int[Tensor, ""]) -> Tensor:
    """This process's part of ``mean over tokens of logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906)."""
    return logits.logsumexp(1).square().sum() / num_tokens
