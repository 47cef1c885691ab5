"""grouped_mm by Triton kernels: fp32, bf16 and fp16 on GPUs of compute capability 8.0 and later, any strides.

Group sizes stay on the device, so a call can be captured in a CUDA graph and replayed with others. fp32 is multiplied
in TF32 only where torch's own products are (``torch.backends.cuda.matmul.fp32_precision``).
"""

import torch
from torch import Tensor

from moesaic.ops.triton import available


def forward(x_RK: Tensor, w_EKN: Tensor, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    matmul = available.load("matmul")
    maps = available.load("maps")
    with torch.cuda.device_of(x_RK):
        groups = maps.group_bounds(sizes_BG, x_RK.shape[0], w_EKN.shape[0])
        return matmul.grouped_mm(matmul.Product(x_RK, w_EKN), groups, out_dtype)


def weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    kernels = available.load("weight_grad")
    maps = available.load("maps")
    with torch.cuda.device_of(x_RK):
        groups = maps.group_bounds(sizes_BG, x_RK.shape[0], num_matrices)
        return kernels.weight_grad(x_RK, grad_RN, groups, x_RK.dtype)


def weight_grad_into(into_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor) -> None:
    kernels = available.load("weight_grad")
    maps = available.load("maps")
    with torch.cuda.device_of(x_RK):
        groups = maps.group_bounds(sizes_BG, x_RK.shape[0], into_EKN.shape[0])
        kernels.weight_grad_into(into_EKN, x_RK, grad_RN, groups)
