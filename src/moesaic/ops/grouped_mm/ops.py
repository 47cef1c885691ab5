"""torch.library definitions of grouped_mm: three operators, their fakes, gradients and vmap rules.

The three are closed under differentiation, so gradients of any order are made of them alone:

======================================  ==========================================  =======================
operator                                computes, for the rows of each group        gradients are
======================================  ==========================================  =======================
``grouped_mm(x, w)``                    ``y = x @ w[e]``                            input_grad, weight_grad
``grouped_mm_input_grad(grad, w)``      ``gx = grad @ w[e].T``                      grouped_mm, weight_grad
``grouped_mm_weight_grad(x, grad, w)``  ``gw[e] = x.T @ grad``                      input_grad, grouped_mm
======================================  ==========================================  =======================

Of the weight that ``grouped_mm_weight_grad`` gets only shape and strides are read: they tell how many matrices there
are, so also whether the blocks share them, and how the gradient is to lie in memory; and of DTensors, on which ranks.

All three take weights of any number of matrices up to that of groups, for a rank's shard may have fewer.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import untouched_by_autocast
from moesaic.ops.grouped_mm.groups import as_blocks, check_operands
from moesaic.ops.grouped_mm.implementations import module_for
from moesaic.ops.layout import empty_gradient, is_transposed

torch.library.define(
    "moesaic::grouped_mm",
    "(Tensor x, Tensor w, Tensor group_sizes, str? impl, ScalarType? out_dtype=None) -> Tensor",
)
torch.library.define(
    "moesaic::grouped_mm_input_grad", "(Tensor grad, Tensor w, Tensor group_sizes, str? impl) -> Tensor"
)
torch.library.define(
    "moesaic::grouped_mm_weight_grad",
    "(Tensor x, Tensor grad, Tensor group_sizes, Tensor w, str? impl) -> Tensor",
)


@torch.library.impl("moesaic::grouped_mm", "default")
@untouched_by_autocast
def _forward(
    x: Tensor, w: Tensor, group_sizes: Tensor, impl: str | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    check_operands("grouped_mm", (("x", x, "RK"), ("w", w, "EKN")), group_sizes)
    sizes_BG = as_blocks(group_sizes)
    module = module_for("grouped_mm", impl, (x, w), sizes_BG, w.shape[0])
    return module.forward(x, w, sizes_BG, out_dtype or x.dtype)


@torch.library.impl("moesaic::grouped_mm_input_grad", "default")
@untouched_by_autocast
def _input_grad(grad: Tensor, w: Tensor, group_sizes: Tensor, impl: str | None) -> Tensor:
    check_operands("grouped_mm_input_grad", (("grad", grad, "RN"), ("w", w, "EKN")), group_sizes)
    sizes_BG = as_blocks(group_sizes)
    module = module_for("grouped_mm_input_grad", impl, (grad, w), sizes_BG, w.shape[0])
    return module.forward(grad, w.mT, sizes_BG, grad.dtype)


@torch.library.impl("moesaic::grouped_mm_weight_grad", "default")
@untouched_by_autocast
def _weight_grad(x: Tensor, grad: Tensor, group_sizes: Tensor, w: Tensor, impl: str | None) -> Tensor:
    check_operands("grouped_mm_weight_grad", (("x", x, "RK"), ("grad", grad, "RN"), ("w", w, "EKN")), group_sizes)
    sizes_BG = as_blocks(group_sizes)
    module = module_for("grouped_mm_weight_grad", impl, (x, grad), sizes_BG, w.shape[0])
    if is_transposed(w):
        return module.weight_grad(grad, x, sizes_BG, w.shape[0]).mT
    return module.weight_grad(x, grad, sizes_BG, w.shape[0])


@torch.library.register_fake("moesaic::grouped_mm")
def _forward_fake(
    x: Tensor, w: Tensor, group_sizes: Tensor, impl: str | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2], dtype=out_dtype or x.dtype)


@torch.library.register_fake("moesaic::grouped_mm_input_grad")
def _input_grad_fake(grad: Tensor, w: Tensor, group_sizes: Tensor, impl: str | None) -> Tensor:
    return grad.new_empty(grad.shape[0], w.shape[1])


@torch.library.register_fake("moesaic::grouped_mm_weight_grad")
def _weight_grad_fake(x: Tensor, grad: Tensor, group_sizes: Tensor, w: Tensor, impl: str | None) -> Tensor:
    return empty_gradient(w, x.dtype)


def grouped_mm_op(
    x: Tensor, w: Tensor, group_sizes: Tensor, impl: str | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    return torch.ops.moesaic.grouped_mm(x, w, group_sizes, impl, out_dtype)


def input_grad_op(grad: Tensor, w: Tensor, group_sizes: Tensor, impl: str | None) -> Tensor:
    return torch.ops.moesaic.grouped_mm_input_grad(grad, w, group_sizes, impl)


def weight_grad_op(x: Tensor, grad: Tensor, group_sizes: Tensor, w: Tensor, impl: str | None) -> Tensor:
    return torch.ops.moesaic.grouped_mm_weight_grad(x, grad, group_sizes, w, impl)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, group_sizes, ctx.impl, *_ = inputs
    ctx.save_for_backward(a, b, group_sizes)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, group_sizes, _, ctx.impl = inputs
    ctx.save_for_backward(x, grad, group_sizes)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, sizes = ctx.saved_tensors
    grad = grad.to(x.dtype)  # differs where out_dtype was given
    gx = input_grad_op(grad, w, sizes, ctx.impl) if ctx.needs_input_grad[0] else None
    gw = weight_grad_op(x, grad, sizes, w, ctx.impl) if ctx.needs_input_grad[1] else None
    return gx, gw, None, None, None


def _input_grad_backward(ctx: Any, grad_gx: Tensor) -> tuple[Tensor | None, ...]:
    grad, w, sizes = ctx.saved_tensors
    ggrad = grouped_mm_op(grad_gx, w, sizes, ctx.impl) if ctx.needs_input_grad[0] else None
    gw = weight_grad_op(grad_gx, grad, sizes, w, ctx.impl) if ctx.needs_input_grad[1] else None
    return ggrad, gw, None, None


def _weight_grad_backward(ctx: Any, grad_gw: Tensor) -> tuple[Tensor | None, ...]:
    x, grad, sizes = ctx.saved_tensors
    gx = input_grad_op(grad, grad_gw, sizes, ctx.impl) if ctx.needs_input_grad[0] else None
    ggrad = grouped_mm_op(x, grad_gw, sizes, ctx.impl) if ctx.needs_input_grad[1] else None
    return gx, ggrad, None, None, None


torch.library.register_autograd("moesaic::grouped_mm", _forward_backward, setup_context=_save)
torch.library.register_autograd("moesaic::grouped_mm_input_grad", _input_grad_backward, setup_context=_save)
torch.library.register_autograd("moesaic::grouped_mm_weight_grad", _weight_grad_backward, setup_context=_save_rows)


def _rows_to_blocks(t: Tensor, dim: int | None, size: int) -> Tensor:
    """``[V, R, D]`` as ``[V * R, D]``, repeated where ``t`` is not batched."""
    t = t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)
    return t.flatten(0, 1)


def _sizes_to_blocks(sizes: Tensor, dim: int | None, size: int) -> Tensor:
    sizes = sizes.movedim(dim, 0) if dim is not None else sizes.expand(size, *sizes.shape)
    return sizes if sizes.ndim == 2 else sizes.flatten(0, 1)


def _weights_to_blocks(w: Tensor, dim: int | None, B: int, G: int, size: int) -> Tensor:
    """The weights of ``size`` problems as those of ``size`` times as many blocks; shared ones stay shared."""
    if dim is None and w.shape[0] == G:
        return w
    w = w.movedim(dim, 0) if dim is not None else w.expand(size, *w.shape)
    if w.shape[1] != B * G:
        w = w.unsqueeze(1).expand(size, B, *w.shape[1:]).flatten(1, 2)
    return w.flatten(0, 1)


def _one_by_one(op: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Tensor:
    """Batched arguments are unbound, the others repeated."""
    columns = (t.unbind(d) if d is not None else [t] * size for t, d in zip(args, in_dims, strict=True))
    return torch.stack([op(*problem) for problem in zip(*columns, strict=True)])


def _blocks_of_one(sizes: Tensor, dim: int | None) -> tuple[int, int]:
    B, G = as_blocks(sizes if dim is None else sizes.movedim(dim, 0)[0]).shape
    return B, G


def _num_matrices(w: Tensor, dim: int | None) -> int:
    return w.shape[0] if dim is None else w.movedim(dim, 0).shape[1]


# Batched problems are blocks: vmap costs no copy but that of a shared operand. Where there are fewer experts than
# groups each problem is a call, for only the last groups can be without expert.
def _vmap_matrix(op: Any) -> Any:
    def rule(info: Any, in_dims: tuple[int | None, ...], a: Tensor, w: Tensor, sizes: Tensor, *flags: Any) -> Any:
        V, (B, G) = info.batch_size, _blocks_of_one(sizes, in_dims[2])
        if _num_matrices(w, in_dims[1]) not in (G, B * G):
            return _one_by_one(op, V, in_dims, (a, w, sizes, *flags)), 0
        w = _weights_to_blocks(w, in_dims[1], B, G, V)
        y = op(_rows_to_blocks(a, in_dims[0], V), w, _sizes_to_blocks(sizes, in_dims[2], V), *flags)
        return y.unflatten(0, (V, -1)), 0

    return rule


def _vmap_weight_grad(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, grad: Tensor, sizes: Tensor, w: Tensor, impl: str | None
) -> Any:
    V, (B, G) = info.batch_size, _blocks_of_one(sizes, in_dims[2])
    num_matrices = _num_matrices(w, in_dims[3])
    if num_matrices not in (G, B * G):
        return _one_by_one(weight_grad_op, V, in_dims, (x, grad, sizes, w, impl)), 0
    x, grad = _rows_to_blocks(x, in_dims[0], V), _rows_to_blocks(grad, in_dims[1], V)
    own = x.new_empty(1).expand(V * B * G, x.shape[1], grad.shape[1])
    gw = weight_grad_op(x, grad, _sizes_to_blocks(sizes, in_dims[2], V), own, impl).unflatten(0, (V, B * G))
    return (gw if num_matrices == B * G else gw.unflatten(1, (B, G)).sum(1)), 0


torch.library.register_vmap("moesaic::grouped_mm", _vmap_matrix(grouped_mm_op))
torch.library.register_vmap("moesaic::grouped_mm_input_grad", _vmap_matrix(input_grad_op))
torch.library.register_vmap("moesaic::grouped_mm_weight_grad", _vmap_weight_grad)
