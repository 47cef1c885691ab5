"""How weights lie in memory, and their gradients with them."""

import torch
from torch import Tensor


def is_transposed(w: Tensor) -> bool:
    """Whether matrices lie column after column, as those of ``checkpoint.mT`` do.

    Their gradient then lies so too: else autograd would bring it to the parameter's layout by a copy that takes longer
    than the product.
    """
    # A symbolic size is no bool by itself.
    return bool(w.stride(-2) == 1 and w.stride(-1) != 1)


def empty_gradient(w: Tensor, dtype: torch.dtype) -> Tensor:
    """What a gradient of ``w`` is written to, or told of by a fake."""
    if is_transposed(w):
        return w.mT.new_empty(w.mT.shape, dtype=dtype).mT
    return w.new_empty(w.shape, dtype=dtype)


def lying_as(w: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of ``w`` where :func:`empty_gradient` has it; itself if it lies so."""
    lies_so = gradient.mT.is_contiguous() if is_transposed(w) else gradient.is_contiguous()
    return gradient if lies_so else empty_gradient(w, gradient.dtype).copy_(gradient)
