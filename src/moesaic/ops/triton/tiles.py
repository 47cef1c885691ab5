"""What kernels share: the order of tiles, loads of rows and weights, and their product.

Functions within a kernel take records of what is known when it runs. What it is compiled for stays an argument of its
own: Triton makes a value of each constant in a record that is given a name, and a value chooses no branch.
"""

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


def layout(t: Tensor) -> str:
    """Of the last two dims: what the loads of a tensor depend on beside its dtype."""
    order = "rows" if t.stride(-1) == 1 else "columns" if t.stride(-2) == 1 else "strided"
    strides = [stride for stride in t.stride() if stride != 1]
    is_aligned = all(stride * t.element_size() % _ALIGNMENT_BYTES == 0 for stride in (*strides, t.data_ptr()))
    return f"{order}{'' if is_aligned else ',unaligned'}"


def precision(dtype: torch.dtype) -> str:
    """Of products in fp32: TF32 only where torch allows it in its own."""
    if dtype in _HALF or torch.version.hip is not None:
        return "ieee"  # there is no choice to make
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Rows(NamedTuple):
    """Within a kernel: rows of K elements, as pointers to the first of each."""

    pointers: Any
    stride_k: Any
    K: Any


class Matrices(NamedTuple):
    """Within a kernel: a weight, which has a matrix ``[K, N]`` for each expert, as pointer or descriptor."""

    data: Any
    stride_e: Any
    stride_k: Any
    stride_n: Any
    K: Any
    N: Any


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
def subtiles(block, M: tl.constexpr, N: tl.constexpr, NUMBER: tl.constexpr):
    """The columns in 1 or 4 parts: what follows a product holds many values an element, and a part at a time fits."""
    if NUMBER == 1:
        return (block,)
    else:
        tl.static_assert(NUMBER == 4)
        left, right = _halves(block, M, N)
        first, second = _halves(left, M, N // 2)
        third, fourth = _halves(right, M, N // 2)
        return first, second, third, fourth


@triton.jit
def _halves(block, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(block, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def load_rows(rows, k, EVEN: tl.constexpr, BK: tl.constexpr):
    """Columns ``k`` to ``k + BK`` of rows, zero past K."""
    columns = k + tl.arange(0, BK)
    pointers = rows.pointers[:, None] + (columns.to(tl.int64) * rows.stride_k)[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < rows.K)[None, :], other=0.0)


@triton.jit
def load_weight(w, expert, k, n, FORM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """The block of an expert's matrix from row ``k`` and column ``n`` on, zero past K and N."""
    if FORM == 1:
        return w.data.load([expert, k, n]).reshape(BK, BN)
    elif FORM == 2:
        return w.data.load([expert, n, k]).reshape(BN, BK).T
    else:
        rows = k + tl.arange(0, BK)
        columns = n + tl.arange(0, BN)
        pointers = w.data + expert.to(tl.int64) * w.stride_e
        pointers += (rows.to(tl.int64) * w.stride_k)[:, None] + (columns.to(tl.int64) * w.stride_n)[None, :]
        return tl.load(pointers, mask=(rows < w.K)[:, None] & (columns < w.N)[None, :], other=0.0)


@triton.jit
def add_product(
    acc,
    rows,
    w,
    expert,
    n,
    FORM: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``acc`` and the product of rows with the BN columns from ``n`` on of an expert's matrix."""
    # Without expert there is nothing to add: no branch around the loop, which would hinder its pipelining.
    for k in tl.range(0, tl.where(expert >= 0, rows.K, 0), BK):
        a = load_rows(rows, k, EVEN, BK)
        b = load_weight(w, expert, k, n, FORM, BK, BN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
