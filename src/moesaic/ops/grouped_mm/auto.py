"""Which implementation ``impl=None`` is: the fastest that was measured on the device and dtype of the operands."""

from types import ModuleType

import torch
from torch import Tensor

from moesaic.ops.fastest import has_cpu_kernels, is_for_cpu_kernels, on_cuda
from moesaic.ops.grouped_mm.impl import cpu
from moesaic.ops.grouped_mm.impl import torch as torch_impl
from moesaic.ops.grouped_mm.impl import triton as triton_impl

_MODULES = {"torch": torch_impl, "triton": triton_impl}


def forward(x_RK: Tensor, w_EKN: Tensor, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    return _fastest("grouped_mm", x_RK, sizes_BG).forward(x_RK, w_EKN, sizes_BG, out_dtype)


def weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    return _fastest("grouped_mm_weight_grad", x_RK, sizes_BG).weight_grad(x_RK, grad_RN, sizes_BG, num_matrices)


def weight_grad_into(into_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor) -> None:
    # Torch's products cannot add to what is wider than they are, so AMX is of no use here.
    module = cpu if has_cpu_kernels(x_RK) else _fastest("grouped_mm_weight_grad", x_RK, sizes_BG)
    module.weight_grad_into(into_EKN, x_RK, grad_RN, sizes_BG)


def _fastest(operator: str, x: Tensor, sizes_BG: Tensor) -> ModuleType:
    if x.device.type == "cuda":
        return _MODULES[on_cuda(operator, x.shape[0], sizes_BG.numel())]
    return cpu if is_for_cpu_kernels(x, x.shape[0], sizes_BG.numel()) else torch_impl
