"""grouped_mm by the kernels of ``csrc/``: fp32 and bf16 on CPU, any strides.

The same call gives the same bits, whatever the number of threads. Subnormal bf16 operands count as zero where the
processor multiplies bf16 itself.
"""

import torch
from torch import Tensor

from moesaic.ops import pool
from moesaic.ops.grouped_mm.groups import are_shared, check_group_sizes
from moesaic.ops.native import BAD_GROUPS, DTYPES, CGroups, check_status, loaded_kernels, matrix, weights
from moesaic.ops.quantized.weight import Weight


def forward(x_RK: Tensor, w_EKN: Weight, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    library, isa = loaded_kernels()
    (R, K), N = x_RK.shape, w_EKN.shape[2]
    y_RN = pool.empty((R, N), out_dtype)
    groups, keep = _groups(sizes_BG, R, w_EKN.shape[0])
    into = (y_RN.data_ptr(), K, N, DTYPES[x_RK.dtype], DTYPES[out_dtype], isa, torch.get_num_threads())
    if isinstance(w_EKN, Tensor):
        status = library.moesaic_cpu_grouped_mm(groups, matrix(x_RK), matrix(w_EKN), w_EKN.stride(0), *into)
    else:
        status = library.moesaic_cpu_quantized_mm(groups, matrix(x_RK), weights(w_EKN), *into)
    _check(status, R, keep, w_EKN.shape[0])
    return y_RN


def weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    gw_EKN = pool.empty((num_matrices, x_RK.shape[1], grad_RN.shape[1]), x_RK.dtype)
    _weight_grad(gw_EKN, x_RK, grad_RN, sizes_BG, accumulate=False)
    return gw_EKN


def weight_grad_into(into_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor) -> None:
    """``into[e] += sum over the groups of e of x[rows].T @ grad[rows]``, each sum in fp32 and rounded once.

    ``into`` is contiguous, of the operands' dtype or fp32, and keeps its values where an expert has no rows.
    """
    _weight_grad(into_EKN, x_RK, grad_RN, sizes_BG, accumulate=True)


def _weight_grad(gw_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, *, accumulate: bool) -> None:
    library, isa = loaded_kernels()
    R, (E, K, N) = x_RK.shape[0], gw_EKN.shape
    groups, keep = _groups(sizes_BG, R, E)
    status = library.moesaic_cpu_weight_grad(
        groups,
        matrix(x_RK),
        matrix(grad_RN),
        gw_EKN.data_ptr(),
        K,
        N,
        DTYPES[x_RK.dtype],
        DTYPES[gw_EKN.dtype],
        accumulate,
        isa,
        torch.get_num_threads(),
    )
    _check(status, R, keep, E)


def _groups(sizes_BG: Tensor, num_rows: int, num_matrices: int) -> tuple[CGroups, Tensor]:
    # The second result owns the memory that the first points to.
    sizes_BG = sizes_BG.to(torch.int64).contiguous()
    B, G = sizes_BG.shape
    shared = are_shared(num_matrices, sizes_BG)
    return CGroups(sizes_BG.data_ptr(), B, G, num_rows, num_matrices, shared), sizes_BG


def _check(status: int, num_rows: int, sizes_BG: Tensor, num_matrices: int) -> None:
    if status == BAD_GROUPS:
        check_group_sizes(num_rows, sizes_BG, num_matrices)  # says what is bad
    check_status("grouped_mm", status)
