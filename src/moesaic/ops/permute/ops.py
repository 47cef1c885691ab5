"""torch.library definitions of the permutation operators.

Slot ``t * K + k`` is copy ``k`` of token ``t``. ``slots [R]`` says which slot a row holds, ``positions [T, K]`` which
row holds a slot; -1 where there is none. The three differentiable operators are closed under differentiation:

==================================  ===================================================  ======================
operator                            computes                                             gradients are
==================================  ===================================================  ======================
``permute(x, weights)``             ``y[r] = weights[slot r] * x[token of r]``           combine, weight_grad
``combine(y, weights)``             ``z[t] = sum over k of weights[t, k] * y[row tk]``   permute, weight_grad
``combine_weight_grad(y, x)``       ``gw[t, k] = <y[row tk], x[t]>``                     permute, combine
==================================  ===================================================  ======================

They gather through an index and never scatter with atomics, so they are deterministic on every device.

Legend: T tokens, K copies a token (top-k), R rows, D model dim, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.ops.debug import debug_checks_enabled
from moesaic.ops.grouped_mm.groups import accumulation_dtype

torch.library.define(
    "moesaic::sort_by_expert", "(Tensor ids, int num_experts, SymInt num_rows) -> (Tensor, Tensor, Tensor)"
)
torch.library.define("moesaic::permute", "(Tensor x, Tensor slots, Tensor positions, Tensor? weights=None) -> Tensor")
torch.library.define("moesaic::combine", "(Tensor y, Tensor slots, Tensor positions, Tensor? weights=None) -> Tensor")
torch.library.define("moesaic::combine_weight_grad", "(Tensor y, Tensor x, Tensor slots, Tensor positions) -> Tensor")


@torch.library.impl("moesaic::sort_by_expert", "default")
def _sort(ids: Tensor, num_experts: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = ids.flatten().to(torch.int64)
    valid = (flat >= 0) & (flat < num_experts)
    key = torch.where(valid, flat, num_experts)
    order = torch.sort(key, stable=True).indices
    group_sizes_E = key.new_zeros(num_experts + 1).scatter_add_(0, key, torch.ones_like(key))[:num_experts]
    num_valid = group_sizes_E.sum()
    if (ids.device.type == "cpu" or debug_checks_enabled()) and int(num_valid) > num_rows:
        raise ValueError(f"num_rows: {num_rows} rows cannot hold the {int(num_valid)} routed token copies")
    rows = torch.arange(flat.numel(), device=ids.device)
    positions = torch.empty_like(order).scatter_(0, order, rows)
    positions = torch.where(valid, positions, -1).view(ids.shape)
    slots = torch.where(rows < num_valid, order, -1)[:num_rows]
    slots = torch.nn.functional.pad(slots, (0, num_rows - slots.numel()), value=-1)
    return slots, positions, group_sizes_E.clone()


@torch.library.impl("moesaic::permute", "default")
def _permute(x: Tensor, slots: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    K = positions.shape[1]
    if x.shape[0] == 0 or K == 0:
        return x.new_zeros(slots.shape[0], x.shape[1])
    y_RD = x.index_select(0, slots.clamp(min=0) // K)
    if weights is not None:
        weight_R = weights.flatten().index_select(0, slots.clamp(min=0))
        acc = accumulation_dtype(x.dtype)
        y_RD = (y_RD.to(acc) * weight_R.to(acc).unsqueeze(1)).to(x.dtype)
    return y_RD.masked_fill_((slots < 0).unsqueeze(1), 0)


@torch.library.impl("moesaic::combine", "default")
def _combine(y: Tensor, slots: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    acc = accumulation_dtype(y.dtype)
    z_TD = y.new_zeros(positions.shape[0], y.shape[1], dtype=acc)
    if y.shape[0] == 0:
        return z_TD.to(y.dtype)
    for k, position_T in enumerate(positions.unbind(1)):
        y_TD = y.index_select(0, position_T.clamp(min=0)).to(acc)
        if weights is not None:
            y_TD = y_TD * weights[:, k].to(acc).unsqueeze(1)
        # Filled and not multiplied by zero: the row read for an absent copy may hold an Inf.
        z_TD += y_TD.masked_fill_((position_T < 0).unsqueeze(1), 0)
    return z_TD.to(y.dtype)


@torch.library.impl("moesaic::combine_weight_grad", "default")
def _combine_weight_grad(y: Tensor, x: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    acc = accumulation_dtype(y.dtype)
    gw_TK = y.new_zeros(positions.shape, dtype=acc)
    if y.shape[0] == 0:
        return gw_TK
    x = x.to(acc)
    for k, position_T in enumerate(positions.unbind(1)):
        dot_T = (y.index_select(0, position_T.clamp(min=0)).to(acc) * x).sum(1)
        gw_TK[:, k] = dot_T.masked_fill_(position_T < 0, 0)
    return gw_TK


@torch.library.register_fake("moesaic::sort_by_expert")
def _sort_fake(ids: Tensor, num_experts: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    def index(*shape: int) -> Tensor:
        return ids.new_empty(shape, dtype=torch.int64)

    return index(num_rows), index(*ids.shape), index(num_experts)


@torch.library.register_fake("moesaic::permute")
def _permute_fake(x: Tensor, slots: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    return x.new_empty(slots.shape[0], x.shape[1])


@torch.library.register_fake("moesaic::combine")
def _combine_fake(y: Tensor, slots: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    return y.new_empty(positions.shape[0], y.shape[1])


@torch.library.register_fake("moesaic::combine_weight_grad")
def _combine_weight_grad_fake(y: Tensor, x: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    return y.new_empty(positions.shape, dtype=accumulation_dtype(y.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, slots, positions, weights = ctx.saved_tensors
    gx = gw = None
    if ctx.needs_input_grad[0]:
        gx = torch.ops.moesaic.combine(grad, slots, positions, weights)
    if weights is not None and ctx.needs_input_grad[3]:
        gw = torch.ops.moesaic.combine_weight_grad(grad, x, slots, positions).to(weights.dtype)
    return gx, None, None, gw


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, slots, positions, weights = ctx.saved_tensors
    gy = gw = None
    if ctx.needs_input_grad[0]:
        gy = torch.ops.moesaic.permute(grad, slots, positions, weights)
    if weights is not None and ctx.needs_input_grad[3]:
        gw = torch.ops.moesaic.combine_weight_grad(y, grad, slots, positions).to(weights.dtype)
    return gy, None, None, gw


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, x, slots, positions = ctx.saved_tensors
    gy = gx = None
    if ctx.needs_input_grad[0]:
        gy = torch.ops.moesaic.permute(x, slots, positions, grad)
    if ctx.needs_input_grad[1]:
        gx = torch.ops.moesaic.combine(y, slots, positions, grad)
    return gy, gx, None, None


torch.library.register_autograd("moesaic::permute", _permute_backward, setup_context=_save)
torch.library.register_autograd("moesaic::combine", _combine_backward, setup_context=_save)
torch.library.register_autograd("moesaic::combine_weight_grad", _weight_grad_backward, setup_context=_save)
