"""What kernels share: the order of tiles, loads of rows and weights."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.ops.triton.device import Device

_ALIGNMENT_BYTES = 16
_HALF = (torch.bfloat16, torch.float16)


class Weight(NamedTuple):
    """A weight ``[E, K, N]`` as a kernel's argument.

    Attributes:
        data: the tensor, or a descriptor of it.
        strides: of the three dims.
        form: 0 for pointers; a descriptor for the tensor memory accelerator, 1 where rows are contiguous and 2 where
            columns are.
    """

    data: Any
    strides: tuple[int, ...]
    form: int


def as_weight(w_EKN: Tensor, block_K: int, block_N: int, device: Device) -> Weight:
    """By descriptor where the device can and the tensor is aligned for it: its loads take no registers and no masks.

    The descriptor has three dims, so that a block that ends past one expert's matrix is filled with zeros and not with
    the next expert's values.
    """
    if device.has_tma and w_EKN.dtype in _HALF and w_EKN.numel() > 0 and w_EKN.data_ptr() % _ALIGNMENT_BYTES == 0:
        for form, t, block in ((1, w_EKN, (block_K, block_N)), (2, w_EKN.mT, (block_N, block_K))):
            if t.stride(2) == 1 and _is_aligned(t):
                return Weight(TensorDescriptor.from_tensor(t, [1, *block]), w_EKN.stride(), form)
    return Weight(w_EKN, w_EKN.stride(), 0)


def _is_aligned(t: Tensor) -> bool:
    return all(stride > 0 and stride * t.element_size() % _ALIGNMENT_BYTES == 0 for stride in t.stride()[:2])


def precision(dtype: torch.dtype) -> str:
    """Of products in fp32: TF32 only where torch allows it in its own."""
    if dtype in _HALF or torch.version.hip is not None:
        return "ieee"  # there is no choice to make
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def ordered(work, num_tiles, num_columns, GROUP_M: tl.constexpr):
    """Row tile and column of piece ``work``: down bands of GROUP_M row tiles, so that L2 keeps rows and weights."""
    band = work // (GROUP_M * num_columns)
    height = tl.minimum(num_tiles - band * GROUP_M, GROUP_M)
    within = work - band * GROUP_M * num_columns
    return band * GROUP_M + within % height, within // height


@triton.jit
def load_tile(tiles, tile):
    """Expert, first row and end of a tile."""
    return tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)


@triton.jit
def tile_rows(first, end, M: tl.constexpr):
    """The rows of a tile; past its end the last one again, which is there to be read and is not stored."""
    return tl.minimum(first + tl.arange(0, M), end - 1)


@triton.jit
def halves(block, M: tl.constexpr, N: tl.constexpr):
    """The left and the right columns: what follows a product holds many values an element, and half at a time fits."""
    return tl.split(tl.permute(tl.reshape(block, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def load_rows(row_pointers, k, K, stride, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``k`` to ``k + BLOCK`` of rows, zero past K."""
    columns = k + tl.arange(0, BLOCK)
    pointers = row_pointers[:, None] + (columns.to(tl.int64) * stride)[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < K)[None, :], other=0.0)


@triton.jit
def load_weight(
    w, expert, k, n, K, N, stride_e, stride_k, stride_n, FORM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr
):
    """The block of an expert's matrix from row ``k`` and column ``n`` on, zero past K and N."""
    if FORM == 1:
        return w.load([expert, k, n]).reshape(BK, BN)
    elif FORM == 2:
        return w.load([expert, n, k]).reshape(BN, BK).T
    else:
        rows = k + tl.arange(0, BK)
        columns = n + tl.arange(0, BN)
        pointers = w + expert.to(tl.int64) * stride_e
        pointers += (rows.to(tl.int64) * stride_k)[:, None] + (columns.to(tl.int64) * stride_n)[None, :]
        return tl.load(pointers, mask=(rows < K)[:, None] & (columns < N)[None, :], other=0.0)
