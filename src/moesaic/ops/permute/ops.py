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

Legend: T tokens, K copies a token (top-k), R rows, D model dim, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.permute import kernels

torch.library.define(
    "moesaic::sort_by_expert", "(Tensor ids, int num_experts, SymInt num_rows) -> (Tensor, Tensor, Tensor)"
)
torch.library.define("moesaic::permute", "(Tensor x, Tensor slots, Tensor positions, Tensor? weights=None) -> Tensor")
torch.library.define("moesaic::combine", "(Tensor y, Tensor slots, Tensor positions, Tensor? weights=None) -> Tensor")
torch.library.define("moesaic::combine_weight_grad", "(Tensor y, Tensor x, Tensor slots, Tensor positions) -> Tensor")


for _name in ("sort_by_expert", "permute", "combine", "combine_weight_grad"):
    torch.library.impl(f"moesaic::{_name}", "default", getattr(kernels, _name))


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


def _save_rows_for_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Rows are as much memory as all that is computed of them: they are kept for the gradient of weights alone."""
    rows, slots, positions, weights = inputs
    ctx.save_for_backward(rows if weights is not None and ctx.needs_input_grad[3] else None, slots, positions, weights)


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


torch.library.register_autograd("moesaic::permute", _permute_backward, setup_context=_save_rows_for_weights)
torch.library.register_autograd("moesaic::combine", _combine_backward, setup_context=_save_rows_for_weights)
torch.library.register_autograd("moesaic::combine_weight_grad", _weight_grad_backward, setup_context=_save)
