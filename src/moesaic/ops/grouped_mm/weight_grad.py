"""The public function ``grouped_mm_weight_grad``: the products of ``x.T`` and ``grad``, group by group."""

from jaxtyping import Float, Int
from torch import Tensor

from moesaic.ops.arguments import check_given, check_tensors
from moesaic.ops.autocast import autocast
from moesaic.ops.forward_ad import refuse_forward_ad
from moesaic.ops.grouped_mm.api import check_dtypes, check_shapes
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS, Implementation
from moesaic.ops.grouped_mm.ops import weight_grad_op
from moesaic.ops.implementations import check_name


def grouped_mm_weight_grad(
    x: Float[Tensor, "R K"],
    grad: Float[Tensor, "R N"],
    group_sizes: Int[Tensor, " E"] | Int[Tensor, "B G"],
    *,
    like: Float[Tensor, "W K N"] | None = None,
    impl: Implementation | None = None,
) -> Float[Tensor, "W K N"]:
    """Multiply the rows of each group, transposed, by the same rows of ``grad``.

    ``gw[e] = sum over the groups of e of x[rows].T @ grad[rows]``: the gradient of ``w`` in
    ``y = grouped_mm(x, w, group_sizes)``, where ``grad`` is the gradient of ``y``. An expert without rows gets zeros.
    For backward passes that are written by hand, and where grouped_gemm has ``trans_a=True``.

    Args:
        x: rows, fp64, fp32, bf16 or fp16, any strides.
        grad: rows of the same number and dtype.
        group_sizes: as in :func:`moesaic.grouped_mm`.
        like: the weight, whose values are not read: the result has its shape, lies in memory as it does, and as a
            DTensor is placed as it is. None for one matrix a group; needed where the blocks share their experts.
        impl: as in :func:`moesaic.grouped_mm`.

    Returns:
        ``[W, K, N]`` in the dtype of ``x``. Half-precision products are accumulated in fp32 and rounded once.

    Under ``torch.autocast`` ``x`` and ``grad`` are cast to the autocast dtype. Differentiable any number of times in
    both; deterministic.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as :func:`moesaic.grouped_mm`.

    Example:
        >>> x, grad = torch.randn(6, 4), torch.randn(6, 5)
        >>> moesaic.ops.grouped_mm_weight_grad(x, grad, torch.tensor([2, 0, 4])).shape
        torch.Size([3, 4, 5])
    """
    check_given(x=x, grad=grad, group_sizes=group_sizes)
    check_tensors(like=like)
    refuse_forward_ad("grouped_mm_weight_grad", x, grad)
    x, grad = autocast(x, grad)
    check_dtypes(x, grad, group_sizes, "grad")
    if x.ndim != 2:
        raise ValueError(f"x: expected [R, K], got {list(x.shape)}; flatten leading dims with x.flatten(0, -2)")
    if grad.ndim != 2 or grad.shape[0] != x.shape[0]:
        raise ValueError(f"grad: expected [{x.shape[0]}, N] to match x, got {list(grad.shape)}")
    if grad.device != x.device:
        raise ValueError(f"grad: is on {grad.device}, x on {x.device}; move it there")
    if like is None:
        like = x.new_empty(1).expand(group_sizes.numel(), x.shape[1], grad.shape[1])
    check_shapes(x, like, group_sizes, "like")
    if like.shape[2] != grad.shape[1]:
        raise ValueError(f"like: expected [E, {x.shape[1]}, {grad.shape[1]}] to match grad, got {list(like.shape)}")
    check_name(impl, IMPLEMENTATIONS)
    return weight_grad_op(x, grad, group_sizes, like.detach(), impl)
