"""``grouped_gemm.backend``: the products in all three forms."""

from typing import NoReturn

from torch import Tensor

from moesaic.ops import grouped_mm, grouped_mm_weight_grad
from moesaic.ops.arguments import check_given


def gmm(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None
) -> Tensor:
    """Multiply consecutive groups of rows.

    ``a[rows of e] @ b[e]``; with ``trans_b`` ``a[rows of e] @ b[e].T``; with ``trans_a``
    ``a[rows of e].T @ b[rows of e]``, which is the gradient of a weight.

    Args:
        a: ``[R, K]``.
        b: ``[E, K, N]``; with ``trans_b`` ``[E, N, K]``; with ``trans_a`` ``[R, N]``.
        batch_sizes: ``[E]``, how many rows each group has; on any device.
        c: filled with the result, if given. Then nothing can be differentiated.

    Returns:
        ``[R, N]``; with ``trans_a`` ``[E, K, N]``; ``c`` if it was given.

    Raises:
        ValueError: both ``trans_a`` and ``trans_b``; shapes that do not fit.
        TypeError: dtypes that do not fit; fp8.
    """
    if trans_a and trans_b:
        raise ValueError("trans_a, trans_b: both are set; set one of them at most")
    refuse_fp8(a=a, b=b)
    check_given(batch_sizes=batch_sizes)
    batch_sizes = batch_sizes.to(a.device)
    if trans_a:
        result = grouped_mm_weight_grad(a, b, batch_sizes)
    else:
        result = grouped_mm(a, b.mT if trans_b else b, batch_sizes)
    return result if c is None else c.copy_(result.detach())


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> NoReturn:
    """Not here.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "sinkhorn: moesaic has no Sinkhorn routing; route with moesaic.TopKRouter, which balances the load of the "
        "experts by a loss (aux_loss_coef) or by a bias (bias_update_speed)"
    )


def refuse_fp8(**tensors: Tensor) -> None:
    """Raise ``TypeError`` for an fp8 tensor, or for what is no tensor, by the name of its argument."""
    check_given(**tensors)
    for name, t in tensors.items():
        if str(t.dtype).startswith("torch.float8"):
            raise TypeError(f"{name}: dtype {t.dtype} is not supported; cast it to torch.bfloat16 or torch.float32")
