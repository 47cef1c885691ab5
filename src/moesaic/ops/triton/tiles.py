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
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    form = weight_form(w_EKN, device)
    if form == 1:
        return Weight(TensorDescriptor.from_tensor(w_EKN, [1, block_K, block_N]), w_EKN.stride(), form)
    if form == 2:
        return Weight(TensorDescriptor.from_tensor(w_EKN.mT, [1, block_N, block_K]), w_EKN.stride(), form)
    return Weight(w_EKN, w_EKN.stride(), form)


def weight_form(w_EKN: Tensor, device: Device) -> int:
    """The form that a :class:`Weight` of it has."""
    return next((form for form, t in ((1, w_EKN), (2, w_EKN.mT)) if _can_describe(t, device)), 0)


def as_rows(x_RK: Tensor, block_R: int, block_K: int, device: Device) -> TensorDescriptor | None:
    """A descriptor of rows that are loaded in order, whatever group they are of; None where there cannot be one.

    Blocks end past the last row of a group: who uses the values masks them, or loads whole blocks only.
    """
    return TensorDescriptor.from_tensor(x_RK, [block_R, block_K]) if rows_have_descriptor(x_RK, device) else None


def rows_have_descriptor(x_RK: Tensor, device: Device) -> bool:
    """Whether :func:`as_rows` gives one."""
    return _can_describe(x_RK, device)


def _can_describe(t: Tensor, device: Device) -> bool:
    """Whether the device has descriptors, and the tensor the strides and the alignment that they need."""
    if not device.has_tma or t.dtype not in _HALF or t.numel() == 0 or t.stride(-1) != 1:
        return False
    strides = t.stride()[:-1]
    is_aligned = all(stride * t.element_size() % _ALIGNMENT_BYTES == 0 for stride in strides)
    return is_aligned and min(strides) > 0 and t.data_ptr() % _ALIGNMENT_BYTES == 0


def layout(t: Tensor) -> str:
    """Of the last two dims: what the loads of a tensor depend on beside its dtype."""
    order = "rows" if t.stride(-1) == 1 else "columns" if t.stride(-2) == 1 else "strided"
    strides = [stride for stride in t.stride() if stride != 1]
    is_aligned = all(stride * t.element_size() % _ALIGNMENT_BYTES == 0 for stride in strides)
    is_aligned &= t.data_ptr() % _ALIGNMENT_BYTES == 0
    return f"{order}{'' if is_aligned else ',unaligned'}"


def precision(dtype: torch.dtype) -> str:
    """Of products in fp32: TF32 only where torch allows it in its own."""
    if dtype in _HALF or torch.version.hip is not None:
        return "ieee"  # there is no choice to make
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Rows(NamedTuple):
    """Within a kernel: rows of K elements, as pointers to the first of each; or the first of rows of a descriptor."""

    data: Any
    stride_k: Any
    K: Any
    first: Any = 0


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
def prefetch(pointers):
    """Into L2; nothing waits for it. The interpreter has no caches."""
    if not _INTERPRETED:
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], tl.int32, False, 1)


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
def load_rows(rows, k, FORM: tl.constexpr, BK: tl.constexpr):
    """Columns ``k`` to ``k + BK`` of rows, zero past K. The form is 1 where K has whole blocks, 2 for a descriptor.

    What a descriptor loads past a tile's rows is others', and so is what comes of it: it is not stored.
    """
    if FORM == 2:
        return rows.data.load([rows.first, k])
    else:
        columns = k + tl.arange(0, BK)
        pointers = rows.data[:, None] + (columns.to(tl.int64) * rows.stride_k)[None, :]
        if FORM == 1:
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
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``acc`` and the product of rows with the BN columns from ``n`` on of an expert's matrix; ROWS is their form."""
    # Without expert there is nothing to add: no branch around the loop, which would hinder its pipelining.
    for k in tl.range(0, tl.where(expert >= 0, rows.K, 0), BK):
        a = load_rows(rows, k, ROWS, BK)
        b = load_weight(w, expert, k, n, FORM, BK, BN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
