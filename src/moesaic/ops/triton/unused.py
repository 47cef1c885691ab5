"""Matrices of experts without rows set to zero; programs of the others end at once."""

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 8192


def zero_unused(w_EKN: Tensor, sizes_E: Tensor) -> None:
    """``w[e] = 0`` wherever ``sizes[e]`` is 0. ``w`` is contiguous."""
    E, size = len(w_EKN), w_EKN[0].numel() if len(w_EKN) else 0
    if E and size:
        _zero_unused_kernel[E, triton.cdiv(size, _ELEMENTS)](w_EKN, sizes_E.contiguous(), size, N=_ELEMENTS)


@triton.jit
def _zero_unused_kernel(w, sizes, size, N: tl.constexpr):
    expert = tl.program_id(0)
    if tl.load(sizes + expert) == 0:
        elements = tl.program_id(1) * N + tl.arange(0, N)
        at = w + expert.to(tl.int64) * size + elements
        tl.store(at, tl.zeros((N,), w.dtype.element_ty), mask=elements < size)
