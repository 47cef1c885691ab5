"""Which implementation ``impl=None`` is: the fastest that was measured on the device and dtype of the operands."""

from types import ModuleType

from torch import Tensor

from moesaic.ops.experts_mlp.impl import cpu
from moesaic.ops.experts_mlp.impl import torch as torch_impl
from moesaic.ops.experts_mlp.impl import triton as triton_impl
from moesaic.ops.experts_mlp.problem import NO_MAIN_GRADS, Forward, Gradients, MainGrads, Needs, Problem
from moesaic.ops.fastest import is_for_cpu_kernels, on_cuda

_MODULES = {"torch": torch_impl, "triton": triton_impl}


def forward(problem: Problem, save: bool) -> Forward:
    return _fastest(problem).forward(problem, save)


def backward(
    grad_TD: Tensor,
    problem: Problem,
    h1_TKF: Tensor,
    h3_TKF: Tensor | None,
    needs: Needs,
    into: MainGrads = NO_MAIN_GRADS,
) -> Gradients:
    return _fastest(problem).backward(grad_TD, problem, h1_TKF, h3_TKF, needs, into)


def _fastest(problem: Problem) -> ModuleType:
    x, num_rows, num_groups = problem.x_TD, problem.ids_TK.numel(), problem.w1_EDF.shape[0]
    if x.device.type == "cuda":
        return _MODULES[on_cuda("experts_mlp", num_rows, num_groups)]
    return cpu if is_for_cpu_kernels(x, num_rows, num_groups) else torch_impl
