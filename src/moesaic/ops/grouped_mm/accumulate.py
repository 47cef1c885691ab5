"""The public function ``accumulate_weight_grad``: a weight gradient added to a buffer that is there."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.ops.arguments import check_fit, check_given
from moesaic.ops.autocast import no_autocast
from moesaic.ops.grouped_mm.api import check_dtypes, check_shapes
from moesaic.ops.grouped_mm.groups import accumulation_dtype, as_blocks, check_operands
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS, Implementation, module_for
from moesaic.ops.implementations import check_name


# No sharding rule: DTensor might add to a redistributed copy, so it refuses the operator.
@torch.library.custom_op("moesaic::grouped_mm_accumulate_weight_grad", mutates_args=("into",))
def _accumulate(into: Tensor, x: Tensor, grad: Tensor, group_sizes: Tensor, impl: str | None) -> None:
    operator = "grouped_mm_accumulate_weight_grad"
    check_operands(operator, (("x", x, "RK"), ("grad", grad, "RN")), group_sizes)
    check_fit(operator, (("x", x, "RK"), ("grad", grad, "RN"), ("into", into, "EKN")))
    if not into.is_contiguous() or into.dtype not in (x.dtype, accumulation_dtype(x.dtype)):
        raise ValueError(f"{operator}: into: give a contiguous tensor of the dtype of x, or fp32 for half types")
    sizes_BG = as_blocks(group_sizes)
    with no_autocast(x.device.type):
        module = module_for(operator, impl, (x, grad), sizes_BG, into.shape[0])
        module.weight_grad_into(into, x, grad, sizes_BG)


@_accumulate.register_fake
def _(into: Tensor, x: Tensor, grad: Tensor, group_sizes: Tensor, impl: str | None) -> None:
    return None


def accumulate_weight_grad(
    into: Float[Tensor, "W K N"],
    x: Float[Tensor, "R K"],
    grad: Float[Tensor, "R N"],
    group_sizes: Int[Tensor, " E"] | Int[Tensor, "B G"],
    *,
    impl: Implementation | None = None,
) -> None:
    """Add the weight gradient of :func:`moesaic.grouped_mm` to ``into``, in place.

    ``into[e] += sum over the groups of e of x[rows].T @ grad[rows]``: what ``y = grouped_mm(x, w, group_sizes)`` adds
    to ``w.grad`` where ``grad`` is that of ``y``. The ``cpu`` and ``triton`` kernels do it without a tensor of the
    weights' size in between; ``torch`` makes one. For gradients kept in fp32 beside half-precision weights over several
    backward passes ("main gradients").

    Args:
        into: contiguous; of the dtype of ``x``, or fp32. An expert without rows keeps its values.
        x, grad, group_sizes: as in :func:`moesaic.grouped_mm`.
        impl: as in :func:`moesaic.grouped_mm`.

    Each sum is accumulated in fp32 for half types and rounded once. Not differentiable. For plain tensors: give it the
    local shards of DTensors.

    Raises:
        ValueError: shapes that do not fit, ``into`` that is not contiguous or that requires a gradient.
        TypeError: dtypes that do not fit.
    """
    check_given(into=into, x=x, grad=grad, group_sizes=group_sizes)
    check_dtypes(x, grad, group_sizes, "grad")
    if into.dtype not in (x.dtype, torch.float32) or x.dtype == torch.float64 != into.dtype:
        raise TypeError(f"into: got {into.dtype} for operands of {x.dtype}; give that dtype, or fp32 for half types")
    if grad.shape != (x.shape[0], into.shape[-1]):
        raise ValueError(f"grad: expected [{x.shape[0]}, {into.shape[-1]}] to match x and into, got {list(grad.shape)}")
    check_shapes(x, into, group_sizes, "into")
    if not into.is_contiguous():
        raise ValueError(f"into: has strides {into.stride()}; give a contiguous tensor")
    if into.requires_grad:
        raise ValueError("into: requires a gradient, and this has none; give a buffer, such as into.detach()")
    if grad.device != x.device:
        raise ValueError(f"grad: is on {grad.device}, x on {x.device}; move it there")
    check_name(impl, IMPLEMENTATIONS)
    _accumulate(into, x.detach(), grad.detach(), group_sizes, impl)
