"""grouped_mm in plain PyTorch. This file is the definition, and the oracle of every test.

Legend: R rows, K and N the matrix dims, E experts, B blocks, G groups a block.
"""

import torch
from torch import Tensor

from moesaic.ops.grouped_mm.groups import accumulation_dtype, iterate_groups
from moesaic.ops.quantized.weight import Weight


def forward(x_RK: Tensor, w_EKN: Weight, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``y[rows of group e] = x[rows of group e] @ w[e]``; every other row is zero."""
    acc = accumulation_dtype(x_RK.dtype)
    y_RN = x_RK.new_zeros(x_RK.shape[0], w_EKN.shape[2], dtype=out_dtype)
    for group in iterate_groups(x_RK.shape[0], sizes_BG, w_EKN.shape[0]):
        y_RN[group.rows] = (x_RK[group.rows].to(acc) @ w_EKN[group.expert].to(acc)).to(out_dtype)
    return y_RN


def weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    """``gw[e] = sum over the groups of e of x[rows].T @ grad[rows]``; zero for an expert without rows."""
    acc = accumulation_dtype(x_RK.dtype)
    gw_EKN = x_RK.new_zeros(num_matrices, x_RK.shape[1], grad_RN.shape[1], dtype=acc)
    for group in iterate_groups(x_RK.shape[0], sizes_BG, num_matrices):
        gw_EKN[group.expert] += x_RK[group.rows].to(acc).mT @ grad_RN[group.rows].to(acc)
    return gw_EKN.to(x_RK.dtype)


def weight_grad_into(into_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor) -> None:
    """``into[e] += sum over the groups of e of x[rows].T @ grad[rows]``, rounded once."""
    acc = accumulation_dtype(x_RK.dtype)
    sums_EKN = into_EKN.to(acc)
    for group in iterate_groups(x_RK.shape[0], sizes_BG, into_EKN.shape[0]):
        sums_EKN[group.expert] += x_RK[group.rows].to(acc).mT @ grad_RN[group.rows].to(acc)
    into_EKN.copy_(sums_EKN)
