"""Matrices of experts without rows set to zero, and no others read or written."""

import torch
from torch import Tensor

from moesaic.ops.triton import available

torch.library.define("moesaic_passes::zero_unused_", "(Tensor(a!) w, Tensor sizes) -> ()")


def _zero_unused(w: Tensor, sizes: Tensor) -> None:
    """``w[e] = 0`` wherever ``sizes[e]`` is 0. ``w`` is ``[E, K, N]``."""
    w.masked_fill_((sizes == 0)[:, None, None], 0)


torch.library.impl("moesaic_passes::zero_unused_", "default", _zero_unused)


@torch.library.impl("moesaic_passes::zero_unused_", "CUDA")
def _zero_unused_on_cuda(w: Tensor, sizes: Tensor) -> None:
    if available.refuses(w) is not None or not w.is_contiguous():
        _zero_unused(w, sizes)
        return
    with torch.cuda.device_of(w):
        available.load("unused").zero_unused(w, sizes)


@torch.library.register_fake("moesaic_passes::zero_unused_")
def _zero_unused_fake(w: Tensor, sizes: Tensor) -> None:
    pass
