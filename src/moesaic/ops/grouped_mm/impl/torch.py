"""grouped_mm out of torch's own matrix multiplications, around the defects of ``torch._grouped_mm``.

On CPU a loop of ``mm`` into the output: what ``torch._grouped_mm`` does there, without its restrictions on dtype,
stride and alignment; where groups are many and keep these, its own loop; and where many have few rows and a small
matrix, ``bmm`` for all of one size. Elsewhere the sizes must not be read to the host: bf16 on Hopper and later goes to
``torch._grouped_mm`` where its restrictions hold, all else to ``bmm`` over row tiles.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.grouped_mm import (
    tiled,
    unused,  # noqa: F401 -- defines the operator
)
from moesaic.ops.grouped_mm.groups import Group, accumulation_dtype, are_shared, iterate_groups
from moesaic.ops.invariant import batch_invariant_enabled, mm_in_tiles
from moesaic.ops.processor import has_amx
from moesaic.ops.quantized.weight import Weight

# Limits of torch._grouped_mm's CUDA kernel.
_MAX_GROUPS = 1023
_ALIGNMENT_BYTES = 16
# From so many groups on, torch's loop in C++ is worth more than what it costs to visit the empty ones, which are no
# more than three of four: there the two take the same time, measured for 256 to 4,096 matrices on Zen 4.
_MANY_GROUPS = 64
_FILLED = 4
# A call of `mm` takes longer than to copy a small matrix. So groups of few rows meet copies of theirs in one call, as
# many at a time as stay in a cache. In half types a call takes oneDNN about ten times as long as MKL's in fp32. There
# copies pay for larger matrices as well, for weight gradients, and up to the limit of rows. In fp32 they pay for one or
# two rows on average. Measured for 256 to 4,096 matrices on Zen 5.
_FEW_ROWS = 32
_FEW_ROWS_OF_FULL_TYPES = 2
_COPIED_BYTES = 1 << 20
_SMALL_BYTES, _SMALL_BYTES_OF_FULL_TYPES = 1 << 17, 1 << 14
_SMALL_GRADIENT_BYTES = 1 << 16


class Products:
    """torch's products over the groups of one call. On CPU the sizes are read once, when this is made.

    Args:
        on: any tensor on the device of the operands.
        num_rows: of all operands that have rows.
        sizes_BG: the sizes of the groups.
        num_matrices: how many there are, shared by the blocks or not.
    """

    def __init__(self, on: Tensor, num_rows: int, sizes_BG: Tensor, num_matrices: int) -> None:
        self._sizes_BG, self._num_matrices = sizes_BG, num_matrices
        self._groups: list[Group] | None = None
        self._are_many = self._are_few_rows = self._are_one_or_two_rows = False
        if on.device.type == "cpu":
            self._groups = list(iterate_groups(num_rows, sizes_BG, num_matrices))
            # One block, with a matrix for each of its groups.
            is_plain = tuple(sizes_BG.shape) == (1, num_matrices)
            self._are_many = is_plain and len(self._groups) >= max(_MANY_GROUPS, num_matrices // _FILLED)
            sizes = [_size(g) for g in self._groups]
            few = sum(size <= _FEW_ROWS for size in sizes)
            self._are_few_rows = is_plain and few >= max(_MANY_GROUPS, len(sizes) // 2)
            self._are_one_or_two_rows = self._are_few_rows and sum(sizes) <= _FEW_ROWS_OF_FULL_TYPES * len(sizes)

    @cached_property
    def _by_size(self) -> "_BySize":
        """For several products of the same groups."""
        assert self._groups is not None
        return _by_size(self._groups)

    def forward(self, x_RK: Tensor, w_EKN: Weight, out_dtype: torch.dtype) -> Tensor:
        if self._groups is not None:
            is_plain = out_dtype == x_RK.dtype and not batch_invariant_enabled() and isinstance(w_EKN, Tensor)
            if is_plain and self._are_for_copies(w_EKN):
                return _batched_forward(x_RK, w_EKN, self._by_size)
            if is_plain and self._are_many and _are_aligned(x_RK, w_EKN):
                return _many_forward(x_RK, w_EKN, self._sizes_BG[0], self._groups)
            return _loop_forward(x_RK, w_EKN, self._groups, out_dtype)
        if isinstance(w_EKN, Tensor) and out_dtype == x_RK.dtype and _library_takes(x_RK, w_EKN, self._sizes_BG):
            return _library_forward(x_RK, w_EKN, self._sizes_BG)
        return tiled.forward(x_RK, w_EKN, self._sizes_BG, out_dtype)

    def _are_for_copies(self, w_EKN: Tensor) -> bool:
        """Whether copies of the matrices in one call are faster than calls with the matrices as they lie."""
        if w_EKN.element_size() == 2:
            return self._are_few_rows and _bytes_each(w_EKN) <= _SMALL_BYTES
        return self._are_one_or_two_rows and _bytes_each(w_EKN) <= _SMALL_BYTES_OF_FULL_TYPES

    def of_rows(self, x_RK: Tensor, w_EKN: Weight) -> Tensor:
        """As :meth:`forward` of one block, and no pass for the rows past the last group: they may hold anything."""
        if self._groups is None and isinstance(w_EKN, Tensor) and _library_takes(x_RK, w_EKN, self._sizes_BG):
            return torch._grouped_mm(x_RK, w_EKN, offs=_ends(self._sizes_BG[0])).contiguous()
        return self.forward(x_RK, w_EKN, x_RK.dtype)

    def weight_grad(self, x_RK: Tensor, grad_RN: Tensor) -> Tensor:
        if self._groups is not None:
            num_bytes = x_RK.shape[1] * grad_RN.shape[1] * x_RK.element_size()
            if self._are_few_rows and x_RK.element_size() == 2 and num_bytes <= _SMALL_GRADIENT_BYTES:
                return _batched_weight_grad(x_RK, grad_RN, self._by_size, self._num_matrices)
            if self._are_many and _are_aligned(x_RK, grad_RN):
                return _many_weight_grad(x_RK, grad_RN, self._sizes_BG[0])
            return _loop_weight_grad(x_RK, grad_RN, self._groups, self._num_matrices)
        grad_RN = grad_RN.contiguous()
        if self._sizes_BG.shape[0] == 1 and self._num_matrices > 0 and _library_takes(x_RK, grad_RN, self._sizes_BG):
            return _library_weight_grad(x_RK, grad_RN, self._sizes_BG, self._num_matrices)
        return tiled.weight_grad(x_RK, grad_RN, self._sizes_BG, self._num_matrices)


def forward(x_RK: Tensor, w_EKN: Weight, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    return Products(x_RK, x_RK.shape[0], sizes_BG, w_EKN.shape[0]).forward(x_RK, w_EKN, out_dtype)


def weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    return Products(x_RK, x_RK.shape[0], sizes_BG, num_matrices).weight_grad(x_RK, grad_RN)


def weight_grad_into(into_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor) -> None:
    # In the dtype of the sum, else it would be rounded twice. The addition is in that dtype too.
    acc = accumulation_dtype(into_EKN.dtype)
    into_EKN += weight_grad(x_RK.to(acc), grad_RN.to(acc), sizes_BG, into_EKN.shape[0])


def _loop_forward(x_RK: Tensor, w_EKN: Weight, groups: list[Group], out_dtype: torch.dtype) -> Tensor:
    if out_dtype != x_RK.dtype:
        x_RK, w_EKN = x_RK.to(out_dtype), w_EKN.to(out_dtype)
    x_RK = _without_gaps(x_RK)
    y_RN = x_RK.new_empty(x_RK.shape[0], w_EKN.shape[2])
    written, in_tiles = 0, batch_invariant_enabled()
    for rows, expert in groups:
        if rows.start > written:
            y_RN[written : rows.start] = 0
        if in_tiles:
            mm_in_tiles(x_RK[rows], w_EKN[expert], y_RN[rows])
        else:
            torch.mm(x_RK[rows], w_EKN[expert], out=y_RN[rows])
        written = rows.stop
    y_RN[written:] = 0
    return y_RN


def _without_gaps(x_RK: Tensor) -> Tensor:
    """AMX kernels multiply what lies after a row by zero: a NaN there comes through (uxlfoundation/oneDNN#5717)."""
    has_gaps = x_RK.stride(1) == 1 and x_RK.stride(0) > x_RK.shape[1]
    return x_RK.contiguous() if has_gaps and x_RK.dtype.itemsize == 2 and has_amx() else x_RK


def _loop_weight_grad(x_RK: Tensor, grad_RN: Tensor, groups: list[Group], num_matrices: int) -> Tensor:
    rows_of: dict[int, list[slice]] = {}
    for rows, expert in groups:
        rows_of.setdefault(expert, []).append(rows)
    gw_EKN = x_RK.new_empty(num_matrices, x_RK.shape[1], grad_RN.shape[1])
    for expert, pieces in rows_of.items():
        if len(pieces) == 1:
            x_rK, grad_rN = x_RK[pieces[0]], grad_RN[pieces[0]]
        else:
            # One product over all blocks' rows, so that half types are rounded once and not once a block.
            x_rK, grad_rN = torch.cat([x_RK[p] for p in pieces]), torch.cat([grad_RN[p] for p in pieces])
        torch.mm(x_rK.mT, grad_rN, out=gw_EKN[expert])
    # One fill for each run of experts without rows.
    for before, after in itertools.pairwise([-1, *sorted(rows_of), num_matrices]):
        if after - before > 1:
            gw_EKN[before + 1 : after] = 0
    return gw_EKN


class _BySize(NamedTuple):
    """Groups of few rows, those of one size S together, and the others.

    Attributes:
        few: experts ``[G]`` and rows ``[G, S]``.
        others: as they are.
        end: of the rows of all groups.
    """

    few: list[tuple[Tensor, Tensor]]
    others: list[Group]
    end: int

    def batches(self, matrix_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of few rows, as many at a time as have copies of their matrices in a cache."""
        most = max(1, _COPIED_BYTES // max(1, matrix_bytes))
        for experts_G, rows_GS in self.few:
            yield from zip(experts_G.split(most), rows_GS.split(most), strict=True)


def _by_size(groups: list[Group]) -> _BySize:
    of_size: dict[int, list[Group]] = {}
    for group in groups:
        of_size.setdefault(_size(group), []).append(group)
    few = []
    for size, found in of_size.items():
        if size <= _FEW_ROWS:
            # Not on the default device, which may be another one.
            experts_G, first_G = torch.tensor([(g.expert, g.rows.start) for g in found], device="cpu").unbind(1)
            few.append((experts_G, first_G.unsqueeze(1) + torch.arange(size, device="cpu")))
    return _BySize(few, [g for g in groups if _size(g) > _FEW_ROWS], groups[-1].rows.stop)


def _batched_forward(x_RK: Tensor, w_EKN: Tensor, groups: _BySize) -> Tensor:
    x_RK = _without_gaps(x_RK)
    y_RN = x_RK.new_empty(x_RK.shape[0], w_EKN.shape[2])
    y_RN[groups.end :] = 0
    in_rows = w_EKN.stride(-1) == 1
    for experts_G, rows_GS in groups.batches(_bytes_each(w_EKN)):
        x_GSK = x_RK.index_select(0, rows_GS.flatten()).unflatten(0, rows_GS.shape)
        w_GKN = w_EKN.index_select(0, experts_G) if in_rows else w_EKN.mT.index_select(0, experts_G).mT
        y_RN.index_copy_(0, rows_GS.flatten(), torch.bmm(x_GSK, w_GKN).flatten(0, 1))
    for rows, expert in groups.others:
        torch.mm(x_RK[rows], w_EKN[expert], out=y_RN[rows])
    return y_RN


def _batched_weight_grad(x_RK: Tensor, grad_RN: Tensor, groups: _BySize, num_matrices: int) -> Tensor:
    gw_EKN = x_RK.new_zeros(num_matrices, x_RK.shape[1], grad_RN.shape[1])
    for experts_G, rows_GS in groups.batches(_bytes_each(gw_EKN)):
        x_GSK, grad_GSN = (t.index_select(0, rows_GS.flatten()).unflatten(0, rows_GS.shape) for t in (x_RK, grad_RN))
        gw_EKN.index_copy_(0, experts_G, torch.bmm(x_GSK.mT, grad_GSN))
    for rows, expert in groups.others:
        torch.mm(x_RK[rows].mT, grad_RN[rows], out=gw_EKN[expert])
    return gw_EKN


def _size(group: Group) -> int:
    return group.rows.stop - group.rows.start


def _bytes_each(w_EKN: Tensor) -> int:
    return w_EKN.shape[1] * w_EKN.shape[2] * w_EKN.element_size()


def _are_aligned(x_RK: Tensor, other: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes these operands on CPU."""
    return (
        x_RK.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and min(*x_RK.shape, *other.shape) > 0
        and x_RK.stride(-1) == 1
        and _is_aligned(x_RK)
        and _is_aligned(other)
        and not (x_RK.dtype.itemsize == 2 and has_amx())  # see `_loop_forward`
    )


def _many_forward(x_RK: Tensor, w_EKN: Tensor, sizes_E: Tensor, groups: list[Group]) -> Tensor:
    y_RN = torch._grouped_mm(x_RK, w_EKN, offs=_ends(sizes_E))
    y_RN[groups[-1].rows.stop :] = 0
    return y_RN.contiguous()  # torch pads rows


def _many_weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_E: Tensor) -> Tensor:
    return torch._grouped_mm(x_RK.mT, grad_RN, offs=_ends(sizes_E)).contiguous()


def _library_takes(x_RK: Tensor, other: Tensor, sizes_BG: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` has a fast kernel for these operands that gives right values."""
    return (
        x_RK.dtype == torch.bfloat16
        # On meta tensors what is counted is what a GPU would do that has the kernel.
        and (x_RK.is_meta or torch.cuda.get_device_capability(x_RK.device) >= (9, 0))
        and 0 < sizes_BG.shape[1] <= _MAX_GROUPS
        and min(*x_RK.shape, *other.shape) > 0
        and x_RK.stride(-1) == 1  # else a group starts wherever its first row does: unaligned
        and _is_aligned(x_RK)
        and _is_aligned(other)
    )


def _is_aligned(t: Tensor) -> bool:
    inner, outer = (-1, -2) if t.stride(-1) == 1 else (-2, -1)
    return (
        t.stride(inner) == 1
        and t.stride(outer) >= max(1, t.shape[inner])
        and all(n * t.element_size() % _ALIGNMENT_BYTES == 0 for n in (t.stride(outer), *t.stride()[:-2]))
        and t.data_ptr() % _ALIGNMENT_BYTES == 0
    )


def _library_forward(x_RK: Tensor, w_EKN: Tensor, sizes_BG: Tensor) -> Tensor:
    B, G = sizes_BG.shape
    shared = are_shared(w_EKN.shape[0], sizes_BG)
    C = x_RK.shape[0] // B
    blocks = []
    for b, sizes_G in enumerate(sizes_BG):
        w_GKN = w_EKN if shared else w_EKN[b * G : (b + 1) * G]
        if not len(w_GKN):
            blocks.append(x_RK.new_zeros(C, w_EKN.shape[2]))
            continue
        ends_G = _ends(sizes_G[: len(w_GKN)])
        y_CN = torch._grouped_mm(x_RK[b * C : (b + 1) * C], w_GKN, offs=ends_G)
        # torch leaves the rows past the last group uninitialised. Groups without an expert are past it.
        past_end_C1 = torch.arange(C, device=y_CN.device).unsqueeze(1) >= ends_G[-1]
        blocks.append(y_CN.masked_fill_(past_end_C1, 0))
    # torch pads rows to 16 bytes; what compiles this expects the strides of the fake.
    return blocks[0].contiguous() if B == 1 else torch.cat(blocks)


def _library_weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    sizes_G = sizes_BG[0, :num_matrices]
    gw_GKN = torch._grouped_mm(x_RK.mT, grad_RN, offs=_ends(sizes_G))
    torch.ops.moesaic_passes.zero_unused_(gw_GKN, sizes_G)
    return gw_GKN


def _ends(sizes_G: Tensor) -> Tensor:
    return sizes_G.cumsum(0).to(torch.int32)
