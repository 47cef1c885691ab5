"""The bias of the down projection, which experts_mlp adds after its kernels: ``z[t] = sum over k of w[t, k] * b[id]``.

Gathered copy by copy, and its gradient summed expert by expert, so that a bias that is not finite stays with the tokens
of its expert. Of the results the backward pass needs nothing.

Legend: T tokens, K copies a token (top-k), D model dim, E experts, R = T * K rows sorted by expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import untouched_by_autocast
from moesaic.ops.experts_mlp.problem import number_by_matrix
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.grouped_mm.impl import torch as grouped
from moesaic.ops.permute import kernels as permuting

torch.library.define("moesaic::experts_down_bias", "(Tensor weights, Tensor ids, Tensor b) -> Tensor")
torch.library.define(
    "moesaic::experts_down_bias_backward", "(Tensor grad, Tensor weights, Tensor ids, Tensor b) -> (Tensor, Tensor)"
)


@torch.library.impl("moesaic::experts_down_bias", "default")
@untouched_by_autocast
def _forward(weights: Tensor, ids: Tensor, b: Tensor) -> Tensor:
    acc = accumulation_dtype(b.dtype)
    z_TD = b.new_zeros(ids.shape[0], b.shape[1], dtype=acc)
    weights = weights.to(acc).masked_fill(_is_absent(ids, b), 0)
    for rows_TD, weights_T in zip(_biases(ids, b), weights.unbind(1), strict=True):
        z_TD += rows_TD * weights_T.unsqueeze(1)
    return z_TD.to(b.dtype)


@torch.library.impl("moesaic::experts_down_bias_backward", "default")
@untouched_by_autocast
def _backward(grad: Tensor, weights: Tensor, ids: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(b.dtype)
    gweights = torch.zeros_like(weights, dtype=acc)
    for k, rows_TD in enumerate(_biases(ids, b)):
        gweights[:, k] = (rows_TD * grad.to(acc)).sum(1)
    gweights.masked_fill_(_is_absent(ids, b), 0)
    slots_R, positions_TK, sizes_E = permuting.sort_by_expert(ids, b.shape[0], ids.numel())
    # Long fp32 sums lose digits, where they are made in one chain.
    wide = torch.float64 if grad.device.type == "cpu" else acc
    grad_RD = permuting.permute(grad.to(wide), slots_R, positions_TK, weights)
    ones_R1 = grad_RD.new_ones(grad_RD.shape[0], 1)
    gb = grouped.weight_grad(ones_R1, grad_RD, sizes_E.unsqueeze(0), b.shape[0]).squeeze(1)
    return gweights.to(weights.dtype), gb.to(b.dtype)


def _is_absent(ids_TK: Tensor, b_ED: Tensor) -> Tensor:
    return (ids_TK < 0) | (ids_TK >= b_ED.shape[0])


def _biases(ids_TK: Tensor, b_ED: Tensor) -> Iterator[Tensor]:
    """Copy by copy the bias of each token's expert, in the accumulation dtype; zeros where there is none."""
    padded = torch.nn.functional.pad(b_ED.to(accumulation_dtype(b_ED.dtype)), (0, 0, 0, 1))
    rows_TK = torch.where(_is_absent(ids_TK, b_ED), b_ED.shape[0], ids_TK)
    return (padded.index_select(0, rows_T) for rows_T in rows_TK.unbind(1))


@torch.library.register_fake("moesaic::experts_down_bias")
def _forward_fake(weights: Tensor, ids: Tensor, b: Tensor) -> Tensor:
    return b.new_empty(ids.shape[0], b.shape[1])


@torch.library.register_fake("moesaic::experts_down_bias_backward")
def _backward_fake(grad: Tensor, weights: Tensor, ids: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), b.new_empty(b.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    gweights, gb = torch.ops.moesaic.experts_down_bias_backward(grad, *ctx.saved_tensors)
    return gweights, None, gb


torch.library.register_autograd("moesaic::experts_down_bias", _gradients, setup_context=_save)


def down_bias(weights_BTK: Tensor, ids_BTK: Tensor, b_WD: Tensor, G: int) -> Tensor:
    """The sum for tokens in blocks, each with ``G`` experts of its own."""
    ids_BTK = number_by_matrix(ids_BTK, G)
    z_TD = torch.ops.moesaic.experts_down_bias(weights_BTK.flatten(0, 1), ids_BTK.flatten(0, 1), b_WD)
    return z_TD.unflatten(0, ids_BTK.shape[:2])
