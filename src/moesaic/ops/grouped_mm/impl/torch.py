"""grouped_mm out of torch's own matrix multiplications, around the defects of ``torch._grouped_mm``.

On CPU a loop of ``mm`` into the output: what ``torch._grouped_mm`` does there, without its restrictions on dtype,
stride and alignment. Elsewhere the sizes must not be read to the host: bf16 on Hopper and later goes to
``torch._grouped_mm`` where its restrictions hold, all else to ``bmm`` over row tiles.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.ops.grouped_mm import tiled
from moesaic.ops.grouped_mm.groups import accumulation_dtype, are_shared, iterate_groups, padding_rows
from moesaic.ops.processor import has_amx

# Limits of torch._grouped_mm's CUDA kernel.
_MAX_GROUPS = 1023
_ALIGNMENT_BYTES = 16


def product_for(x: Tensor) -> Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]:
    """The function that :func:`forward` calls on the device of ``x``."""
    return _loop_forward if x.device.type == "cpu" else _forward_without_sizes


def forward(x_RK: Tensor, w_EKN: Tensor, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    return product_for(x_RK)(x_RK, w_EKN, sizes_BG, out_dtype)


def weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    if x_RK.device.type == "cpu":
        return _loop_weight_grad(x_RK, grad_RN, sizes_BG, num_matrices)
    grad_RN = grad_RN.contiguous()
    if sizes_BG.shape[0] == 1 and num_matrices > 0 and _library_takes(x_RK, grad_RN, sizes_BG):
        return _library_weight_grad(x_RK, grad_RN, sizes_BG, num_matrices)
    return tiled.weight_grad(x_RK, grad_RN, sizes_BG, num_matrices)


def weight_grad_into(into_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor) -> None:
    # In the dtype of the sum, else it would be rounded twice. The addition is in that dtype too.
    acc = accumulation_dtype(into_EKN.dtype)
    into_EKN += weight_grad(x_RK.to(acc), grad_RN.to(acc), sizes_BG, into_EKN.shape[0])


def _loop_forward(x_RK: Tensor, w_EKN: Tensor, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype != x_RK.dtype:
        x_RK, w_EKN = x_RK.to(out_dtype), w_EKN.to(out_dtype)
    has_gaps = x_RK.stride(1) == 1 and x_RK.stride(0) > x_RK.shape[1]
    if has_gaps and x_RK.dtype.itemsize == 2 and has_amx():
        # AMX kernels multiply what lies after a row by zero: a NaN there comes through (uxlfoundation/oneDNN#5717).
        x_RK = x_RK.contiguous()
    y_RN = x_RK.new_empty(x_RK.shape[0], w_EKN.shape[2])
    for group in iterate_groups(x_RK.shape[0], sizes_BG, w_EKN.shape[0]):
        if group.size:
            torch.mm(x_RK[group.rows], w_EKN[group.expert], out=y_RN[group.rows])
    for rows in padding_rows(x_RK.shape[0], sizes_BG):
        y_RN[rows] = 0
    return y_RN


def _forward_without_sizes(x_RK: Tensor, w_EKN: Tensor, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == x_RK.dtype and _library_takes(x_RK, w_EKN, sizes_BG):
        return _library_forward(x_RK, w_EKN, sizes_BG)
    return tiled.forward(x_RK, w_EKN, sizes_BG, out_dtype)


def _loop_weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    rows_of: list[list[slice]] = [[] for _ in range(num_matrices)]
    for group in iterate_groups(x_RK.shape[0], sizes_BG, num_matrices):
        if group.size:
            rows_of[group.expert].append(group.rows)
    gw_EKN = x_RK.new_empty(len(rows_of), x_RK.shape[1], grad_RN.shape[1])
    for gw_KN, pieces in zip(gw_EKN, rows_of, strict=True):
        if not pieces:
            gw_KN.zero_()
        elif len(pieces) == 1:
            torch.mm(x_RK[pieces[0]].mT, grad_RN[pieces[0]], out=gw_KN)
        else:
            # One product over all blocks' rows, so that half types are rounded once and not once a block.
            x_rK, grad_rN = torch.cat([x_RK[p] for p in pieces]), torch.cat([grad_RN[p] for p in pieces])
            torch.mm(x_rK.mT, grad_rN, out=gw_KN)
    return gw_EKN


def _library_takes(x_RK: Tensor, other: Tensor, sizes_BG: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` has a fast kernel for these operands that gives right values."""
    return (
        x_RK.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x_RK.device) >= (9, 0)
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
        ends_G = sizes_G[: len(w_GKN)].cumsum(0).to(torch.int32)
        y_CN = torch._grouped_mm(x_RK[b * C : (b + 1) * C], w_GKN, offs=ends_G)
        # torch leaves the rows past the last group uninitialised. Groups without an expert are past it.
        past_end_C1 = torch.arange(C, device=y_CN.device).unsqueeze(1) >= ends_G[-1]
        blocks.append(y_CN.masked_fill_(past_end_C1, 0))
    # torch pads rows to 16 bytes; what compiles this expects the strides of the fake.
    return blocks[0].contiguous() if B == 1 else torch.cat(blocks)


def _library_weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    sizes_G = sizes_BG[0, :num_matrices]
    gw_GKN = torch._grouped_mm(x_RK.mT, grad_RN, offs=sizes_G.cumsum(0).to(torch.int32))
    return gw_GKN.masked_fill_((sizes_G == 0)[:, None, None], 0)
