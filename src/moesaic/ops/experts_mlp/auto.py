"""Which implementation ``impl=None`` is: the fastest that was measured on the device and dtype of the operands."""

from torch import Tensor

from moesaic.ops.experts_mlp.impl import torch as torch_impl
from moesaic.ops.experts_mlp.problem import Forward, Gradients, Needs, Problem


def forward(problem: Problem, save: bool) -> Forward:
    return torch_impl.forward(problem, save)


def backward(grad_TD: Tensor, problem: Problem, h1_TKF: Tensor, h3_TKF: Tensor | None, needs: Needs) -> Gradients:
    return torch_impl.backward(grad_TD, problem, h1_TKF, h3_TKF, needs)
