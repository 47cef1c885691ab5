"""The passes over rows between the products of experts_mlp, each of which reads and writes what it has to once.

Rows are copies of tokens sorted by expert. Slot ``t * K + k`` is copy ``k`` of token ``t``; ``positions`` say which row
a slot has, -1 where its copy is not here, and ``slots`` which slot a row has. Where a call lists the copies that are
here, lines of that list stand in the place of slots for all that lies by slot.

They are operators so that a device has kernels of its own, and so that what they move can be counted on tensors without
memory. They are called below autograd and DTensor, and have neither gradients nor sharding rules. What a row of no copy
holds afterwards is not said.

Legend: T tokens, K copies a token (top-k), R rows and slots, or lines of a list, D model dim, F hidden dim, E experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.activation import Activation, hidden, slopes
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.invariant import batch_invariant_enabled, in_filled_rows
from moesaic.ops.permute import kernels as permuting
from moesaic.ops.triton import available

torch.library.define(
    "moesaic_passes::hidden",
    "(Tensor h1, Tensor? h3, Tensor? b1, Tensor? b3, Tensor ids, Tensor slots, Tensor positions, str activation, "
    "bool save) -> (Tensor a, Tensor kept1, Tensor kept3)",
)
torch.library.define(
    "moesaic_passes::hidden_gradient",
    "(Tensor ga, Tensor kept1, Tensor? kept3, Tensor weights, Tensor slots, Tensor positions, str activation) "
    "-> (Tensor gh1, Tensor gh3, Tensor weighted, Tensor gweights)",
)
torch.library.define(
    "moesaic_passes::to_tokens",
    "(Tensor y, Tensor? plus, Tensor? weights, Tensor? biases, Tensor ids, Tensor slots, Tensor positions) -> Tensor",
)


def _hidden(
    h1: Tensor,
    h3: Tensor | None,
    b1: Tensor | None,
    b3: Tensor | None,
    ids: Tensor,
    slots: Tensor,
    positions: Tensor,
    activation: Activation,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows ``a [R, F]``, and by slot ``[R, F]`` the pre-activations, zero for copies that are not here.

    ``h1`` and ``h3`` are products ``[R, F]``, ``b1`` and ``b3`` biases ``[E, F]``. Pre-activations that are not saved,
    or not there, have no rows.
    """
    pre = [h if b is None else h + biases_of(b, ids, slots) for h, b in ((h1, b1), (h3, b3)) if h is not None]
    nothing = h1.new_empty(0, h1.shape[1])
    kept = [by_slot(h, positions) for h in pre] if save else []
    kept1, kept3 = (*kept, nothing, nothing)[:2]
    if batch_invariant_enabled():
        return in_filled_rows(partial(hidden, activation), pre), kept1, kept3
    return hidden(activation, pre), kept1, kept3


def _hidden_gradient(
    ga: Tensor,
    kept1: Tensor,
    kept3: Tensor | None,
    weights: Tensor,
    slots: Tensor,
    positions: Tensor,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient ``ga [R, F]`` of the hidden rows of results that are not weighted yet.

    Returns:
        the gradients of the pre-activations ``[R, F]``, of no rows where there is none; ``weights * a``, the rows that
        the gradient of the down projection takes; the gradients of the routing weights ``[R]`` by slot, in the
        accumulation dtype.
    """
    acc, dtype = accumulation_dtype(ga.dtype), ga.dtype
    pre = [by_row(h, slots) for h in (kept1, kept3) if h is not None]
    a, weights_R1 = hidden(activation, pre), by_row(weights.unsqueeze(1), slots).to(acc)
    wide = ga.to(acc)
    dots = by_slot((wide * a.to(acc)).sum(1, keepdim=True), positions).squeeze(1)
    wide = wide * weights_R1
    gradients = [(wide * slope).to(dtype) for slope in slopes(activation, [h.to(acc) for h in pre])]
    gh1, gh3 = (*gradients, ga.new_empty(0, ga.shape[1]))[:2]
    return gh1, gh3, (a.to(acc) * weights_R1).to(dtype), dots


def _to_tokens(
    y: Tensor,
    plus: Tensor | None,
    weights: Tensor | None,
    biases: Tensor | None,
    ids: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    """``z[t] = sum over k of weights[t, k] * (y[row] + plus[row] + biases[ids[t, k]])``; what is None is left out.

    ``ids``, ``positions`` and ``weights`` are ``[T, K]``.
    """
    y = y if plus is None else y + plus
    y = y if biases is None else y + biases_of(biases, ids.flatten(), slots)
    return permuting.combine(y, slots, positions, weights)


def of_tokens(x_TD: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """The token of each row."""
    K = positions.shape[1]
    if not x_TD.numel() or not K:
        return x_TD.new_zeros(len(slots), x_TD.shape[1])
    return x_TD.index_select(0, slots.clamp(min=0) // K)


def by_slot(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows in the order of slots; zeros for copies that are not here."""
    if not rows.numel():
        return rows.new_zeros(len(positions), *rows.shape[1:])
    return rows.index_select(0, positions.clamp(min=0)).masked_fill_((positions < 0).unsqueeze(1), 0)


def by_row(t: Tensor, slots: Tensor) -> Tensor:
    """Values of slots in the order of rows."""
    return t.index_select(0, slots.clamp(min=0)) if t.numel() else t.new_zeros(len(slots), *t.shape[1:])


def biases_of(b_EO: Tensor, ids: Tensor, slots: Tensor) -> Tensor:
    """The bias of each row's expert; zeros for rows of no copy."""
    experts = torch.where(slots < 0, b_EO.shape[0], by_row(ids, slots))
    return torch.nn.functional.pad(b_EO, (0, 0, 0, 1)).index_select(0, experts)


def _register(name: str, composed: Callable[..., object], kernel: str) -> None:
    """By kernels in Triton on CUDA, where there are some for the dtype; out of torch's operations elsewhere."""

    def on_cuda(*args: object) -> object:
        first = args[0]
        assert isinstance(first, Tensor)
        if available.refuses(first) is not None:
            return composed(*args)
        with torch.cuda.device_of(first):
            return getattr(available.load("passes"), kernel)(*args)

    torch.library.impl(f"moesaic_passes::{name}", "default", composed)
    torch.library.impl(f"moesaic_passes::{name}", "CUDA", on_cuda)


_register("hidden", _hidden, "hidden_rows")
_register("hidden_gradient", _hidden_gradient, "hidden_gradient")
_register("to_tokens", _to_tokens, "to_tokens")


@torch.library.register_fake("moesaic_passes::hidden")
def _hidden_fake(
    h1: Tensor, h3: Tensor | None, b1: object, b3: object, ids: Tensor, slots: Tensor, positions: Tensor, *flags: object
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = h1.new_empty(0, h1.shape[1])
    save = flags[1]
    return (
        torch.empty_like(h1),
        torch.empty_like(h1) if save else nothing,
        torch.empty_like(h1) if save and h3 is not None else nothing,
    )


@torch.library.register_fake("moesaic_passes::hidden_gradient")
def _hidden_gradient_fake(
    ga: Tensor, kept1: Tensor, kept3: Tensor | None, weights: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = ga.new_empty(0, ga.shape[1])
    of_up = nothing if kept3 is None else torch.empty_like(ga)
    return (
        torch.empty_like(ga),
        of_up,
        torch.empty_like(ga),
        weights.new_empty(weights.shape, dtype=accumulation_dtype(ga.dtype)),
    )


@torch.library.register_fake("moesaic_passes::to_tokens")
def _to_tokens_fake(
    y: Tensor, plus: object, weights: object, biases: object, ids: Tensor, slots: Tensor, positions: Tensor
) -> Tensor:
    return y.new_empty(positions.shape[0], y.shape[1])
