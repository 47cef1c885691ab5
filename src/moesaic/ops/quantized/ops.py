"""torch.library definitions of grouped_mm with a quantised weight: two operators, each the gradient of the other.

They are given data and scales, which are tensors like any others to DTensor. ``width`` is the last dim of the result;
it is read where data is flat and does not tell, and then no rank has a part of it.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import untouched_by_autocast
from moesaic.ops.grouped_mm.groups import as_blocks, check_operands
from moesaic.ops.quantized.formats import Format, is_flat, sizes_of
from moesaic.ops.quantized.implementations import module_for_product
from moesaic.ops.quantized.weight import QuantizedWeight

torch.library.define(
    "moesaic::quantized_mm",
    "(Tensor x, Tensor data, Tensor scales, Tensor group_sizes, str format, SymInt width, str? impl, "
    "ScalarType? out_dtype=None) -> Tensor",
)
torch.library.define(
    "moesaic::quantized_mm_input_grad",
    "(Tensor grad, Tensor data, Tensor scales, Tensor group_sizes, str format, SymInt width, str? impl) -> Tensor",
)


def weight_of(data: Tensor, scales: Tensor, format: Format, dtype: torch.dtype, I: Any, O: Any) -> QuantizedWeight:  # noqa: E741
    """The weight of this data, decoded to ``dtype``. ``I`` and ``O`` are read where data does not tell."""
    # Contiguous already, but for what a user has cut.
    data, scales = data.contiguous(), scales.detach().contiguous()
    return QuantizedWeight(data, scales, format, (I, O) if is_flat(format, data) else None, dtype=dtype)


@torch.library.impl("moesaic::quantized_mm", "default")
@untouched_by_autocast
def _forward(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    group_sizes: Tensor,
    format: Format,
    width: Any,
    impl: str | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    w = weight_of(data, scales, format, x.dtype, x.shape[1], width)
    check_operands("quantized_mm", (("x", x, "RK"), ("w", w, "EKN")), group_sizes)
    sizes_BG = as_blocks(group_sizes)
    module = module_for_product("quantized_mm", impl, x, w, sizes_BG)
    return module.forward(x, w, sizes_BG, out_dtype or x.dtype)


@torch.library.impl("moesaic::quantized_mm_input_grad", "default")
@untouched_by_autocast
def _input_grad(
    grad: Tensor, data: Tensor, scales: Tensor, group_sizes: Tensor, format: Format, width: Any, impl: str | None
) -> Tensor:
    w = weight_of(data, scales, format, grad.dtype, width, grad.shape[1])
    check_operands("quantized_mm_input_grad", (("grad", grad, "RN"), ("w", w, "EKN")), group_sizes)
    sizes_BG = as_blocks(group_sizes)
    module = module_for_product("quantized_mm_input_grad", impl, grad, w, sizes_BG)
    return module.forward(grad, w.mT, sizes_BG, grad.dtype)


@torch.library.register_fake("moesaic::quantized_mm")
def _forward_fake(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    group_sizes: Tensor,
    format: Format,
    width: Any,
    impl: str | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    O = width if is_flat(format, data) else sizes_of(format, data)[1]  # noqa: E741
    return x.new_empty(x.shape[0], O, dtype=out_dtype or x.dtype)


@torch.library.register_fake("moesaic::quantized_mm_input_grad")
def _input_grad_fake(
    grad: Tensor, data: Tensor, scales: Tensor, group_sizes: Tensor, format: Format, width: Any, impl: str | None
) -> Tensor:
    I = width if is_flat(format, data) else sizes_of(format, data)[0]  # noqa: E741
    return grad.new_empty(grad.shape[0], I)


def product_op(
    x: Tensor, w: QuantizedWeight, group_sizes: Tensor, impl: str | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``y[r] = x[r] @ w[e]``, of a weight that may be the ``.mT`` of another."""
    operands = (w.data, w.scales, group_sizes, w.format, w.shape[2], impl)
    if w.transposed:
        y = torch.ops.moesaic.quantized_mm_input_grad(x, *operands)
        return y if out_dtype is None else y.to(out_dtype)
    return torch.ops.moesaic.quantized_mm(x, *operands, out_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scales, group_sizes, ctx.format, _, ctx.impl, *_ = inputs
    ctx.dtype, ctx.width = x.dtype, x.shape[1]
    ctx.save_for_backward(data, scales, group_sizes)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gx = None
    if ctx.needs_input_grad[0]:
        grad = grad.to(ctx.dtype)  # differs where out_dtype was given
        gx = torch.ops.moesaic.quantized_mm_input_grad(grad, *ctx.saved_tensors, ctx.format, ctx.width, ctx.impl)
    return gx, *[None] * 7


def _input_grad_backward(ctx: Any, grad_gx: Tensor) -> tuple[Tensor | None, ...]:
    ggrad = None
    if ctx.needs_input_grad[0]:
        ggrad = torch.ops.moesaic.quantized_mm(grad_gx, *ctx.saved_tensors, ctx.format, ctx.width, ctx.impl)
    return ggrad, *[None] * 6


torch.library.register_autograd("moesaic::quantized_mm", _forward_backward, setup_context=_save)
torch.library.register_autograd("moesaic::quantized_mm_input_grad", _input_grad_backward, setup_context=_save)
