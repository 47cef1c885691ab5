"""Losses that keep the load of experts balanced, and how they reach the training loop.

Legend: T tokens, E experts, K top-k.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesaic.layers.carrier import carry
from moesaic.layers.recompute import backward_pass, defer, give_deferred_gradient, is_recomputing
from moesaic.layers.uncounted import is_uncounted


class _Collected(NamedTuple):
    """The losses of a :func:`balance_losses`, and where it was entered: in which backward pass, with gradients or not.

    A context around a checkpointed function must not get the losses of its second forward pass. A context inside must.
    """

    losses: list[Tensor]
    backward_pass: int
    with_gradients: bool


_COLLECTED: ContextVar[_Collected | None] = ContextVar("moesaic_balance_losses", default=None)


@contextlib.contextmanager
def balance_losses() -> Iterator[list[Tensor]]:
    """Collect the load-balancing losses and z-losses of every router that is called inside.

    Yields a list. The forward pass appends scalars to it. Each is this process's *part* of a loss, divided by the
    number of tokens of all processes. Add them to this process's part of the main loss. Then losses and gradients,
    summed over the processes, are those of the whole batch. Outside this context the losses are dropped.
    With gradient accumulation, divide them by the number of forward passes, since each is a mean over the tokens of
    one forward pass.

    Activation checkpointing adds each loss once. With ``use_reentrant=True`` call backward on the sum of main loss and
    balance losses, not on each. The gradient of a balance loss is needed when the forward pass runs again.

    Raises:
        RuntimeError: a router in training mode runs under ``torch.no_grad()``, so that its loss would have no gradient.
            It is no error if the context was entered under ``torch.no_grad()`` too, or if a checkpoint runs the router
            again. A backward pass raises if the gradient of a balance loss can no longer reach its router.

    Example:
        >>> with moesaic.balance_losses() as losses:
        ...     out = model(x)
        >>> loss = main_loss(out) + sum(losses)
    """
    losses: list[Tensor] = []
    token = _COLLECTED.set(_Collected(losses, backward_pass(), torch.is_grad_enabled()))
    try:
        yield losses
    finally:
        _COLLECTED.reset(token)


def record_loss(loss: Tensor, carrier: Tensor) -> Tensor:
    """Hand a loss to the enclosing :func:`balance_losses`, if there is one.

    Returns:
        ``carrier``, a tensor that the layer goes on with. If a forward pass runs again, the backward pass of the
        carrier can also be that of the loss.

    Raises:
        RuntimeError: gradients are off, and no checkpoint runs this forward pass again.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "balance_losses: not under torch.compile(fullgraph=True), for losses leave a layer on the side; leave out "
            "fullgraph, set aux_loss_coef and z_loss_coef to 0, or call moesaic.layers.attach_balance_losses"
        )
    collected = _collected()
    if collected is not None and (
        collected.backward_pass == backward_pass() and (torch.is_grad_enabled() or not collected.with_gradients)
    ):
        collected.losses.append(loss)
        return carrier
    if torch.is_grad_enabled():
        return give_deferred_gradient(loss, carrier) if is_recomputing() else carrier
    if is_recomputing():
        defer(loss)
    elif collected is not None:
        deferred = defer(loss)
        if deferred is None:
            raise RuntimeError(
                "balance_losses: a router in training mode ran without gradients, so its balance loss has no gradient. "
                "To evaluate, call model.eval(), or run the model outside balance_losses()"
            )
        collected.losses.append(deferred)
    return carrier


def attach_loss(loss: Tensor, carrier: Tensor, scale: float | Tensor) -> Tensor:
    """``carrier``, whose backward pass is also that of ``scale * loss``. Hands over the value of the loss.

    Where the first forward has no gradients, as with ``use_reentrant=True``, the one that is run again has them.
    """
    # Compiled code cannot ask for a context.
    collected = None if torch.compiler.is_compiling() else _collected()
    if collected is not None and collected.backward_pass == backward_pass():
        collected.losses.append(loss.detach())
    return carry(carrier, loss, partial(_scalar_like, scale, loss.dtype, loss.device))


def _collected() -> _Collected | None:
    return None if is_uncounted() else _COLLECTED.get()


def _scalar_like(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=device).reshape(())


def load_balancing_loss(
    scores: Float[Tensor, "T E"],
    total_counts: Int[Tensor, " E"],
    num_tokens: Int[Tensor, ""],
    token_mask: Bool[Tensor, " T"] | None = None,
) -> Tensor:
    """This process's part of ``E * sum over e of f_e * P_e``. The loss is 1 if all scores and all loads are equal.

    ``f_e`` is the share of all routed token copies that expert e got. It has no gradient. ``P_e`` is the mean score of
    expert e over all tokens, after the scores of each token are normalised to sum to 1. From the Switch Transformer
    (arXiv 2101.03961), for top-k as in Megatron-Core.

    Args:
        scores: the scores of this process's tokens.
        total_counts: the number of token copies that each expert got, over all processes.
        num_tokens: the number of tokens of all processes, without padding.
        token_mask: False for padding, which does not count; None if there is no padding.
    """
    share_E = total_counts.to(scores.dtype) / total_counts.sum().clamp(min=1)
    probability_sum_E = without_padding(normalized(scores), token_mask).sum(0)
    return scores.shape[1] * (share_E * probability_sum_E).sum() / num_tokens


def router_z_loss(
    logits: Float[Tensor, "T E"], num_tokens: Int[Tensor, ""], token_mask: Bool[Tensor, " T"] | None = None
) -> Tensor:
    """This process's part of ``mean over tokens of logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906).

    ``num_tokens`` and ``token_mask`` are those of :func:`load_balancing_loss`.
    """
    return without_padding(logits.logsumexp(1, keepdim=True).square(), token_mask).sum() / num_tokens


def normalized(scores: Tensor) -> Tensor:
    """The scores ``[T, E]``, divided so that those of each token sum to 1."""
    return scores / scores.sum(1, keepdim=True).clamp(min=1e-20)


def without_padding(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """The values ``[T, n]``, with zeros in the rows of padding."""
    return values if token_mask is None else values.masked_fill(~token_mask.unsqueeze(1), 0)
