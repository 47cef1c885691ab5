"""The bias of the down projection, which experts_mlp adds after its kernels: ``z[t] = sum over k of w[t, k] * b[id]``.

Gathered copy by copy, and its gradient summed expert by expert, so that a bias that is not finite stays with the tokens
of its expert. Of the results the backward pass needs nothing.

Legend: T tokens, K copies a token (top-k), D model dim, E experts, R = T * K rows sorted by expert.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import untouched_by_autocast
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
    (T, K), acc = ids.shape, accumulation_dtype(b.dtype)
    z_TD = b.new_zeros(T, b.shape[1], dtype=acc)
    for k in range(K):
        z_TD += _rows_of(b, ids[:, k]) * weights[:, k].to(acc).masked_fill(_is_absent(b, ids[:, k]), 0).unsqueeze(1)
    return z_TD.to(b.dtype)


@torch.library.impl("moesaic::experts_down_bias_backward", "default")
@untouched_by_autocast
def _backward(grad: Tensor, weights: Tensor, ids: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(b.dtype)
    gweights = torch.zeros_like(weights, dtype=acc)
    for k in range(ids.shape[1]):
        dot_T = (_rows_of(b, ids[:, k]) * grad.to(acc)).sum(1)
        gweights[:, k] = dot_T.masked_fill_(_is_absent(b, ids[:, k]), 0)
    slots_R, positions_TK, sizes_E = permuting.sort_by_expert(ids, b.shape[0], ids.numel())
    # Long fp32 sums lose digits, where they are made in one chain.
    wide = torch.float64 if grad.device.type == "cpu" else acc
    grad_RD = permuting.permute(grad.to(wide), slots_R, positions_TK, weights)
    ones_R1 = grad_RD.new_ones(grad_RD.shape[0], 1)
    gb = grouped.weight_grad(ones_R1, grad_RD, sizes_E.unsqueeze(0), b.shape[0]).squeeze(1)
    return gweights.to(weights.dtype), gb.to(b.dtype)


def _is_absent(b_ED: Tensor, ids_T: Tensor) -> Tensor:
    return (ids_T < 0) | (ids_T >= b_ED.shape[0])


def _rows_of(b_ED: Tensor, ids_T: Tensor) -> Tensor:
    """The bias of each token's expert; of zeros where there is none."""
    padded = torch.nn.functional.pad(b_ED.to(accumulation_dtype(b_ED.dtype)), (0, 0, 0, 1))
    return padded.index_select(0, torch.where(_is_absent(b_ED, ids_T), b_ED.shape[0], ids_T))


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
    B = ids_BTK.shape[0]
    if B > 1:
        first_B11 = (torch.arange(B, device=ids_BTK.device) * G)[:, None, None]
        ids_BTK = torch.where((ids_BTK >= 0) & (ids_BTK < G), ids_BTK + first_B11, -1)
    z_TD = torch.ops.moesaic.experts_down_bias(weights_BTK.flatten(0, 1), ids_BTK.flatten(0, 1), b_WD)
    return z_TD.unflatten(0, ids_BTK.shape[:2])
