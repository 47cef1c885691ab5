"""experts_mlp by Triton kernels: fp32, bf16 and fp16 on GPUs of compute capability 8.0 and later, any strides.

Forward: gather, both up projections and the activation in one kernel, the down projection, and a gather-sum. Backward:
the gradient of the hidden rows with those of the activation and of the routing weights in one kernel, the gather fused
in the weight gradients, and a gather-sum again. No sum is made by atomics; nothing of the routing is read to the host,
so a call can be captured in a CUDA graph and replayed with another routing.

Legend: T tokens, K copies a token (top-k), R = T * K rows sorted by expert, D model dim, F hidden dim, E experts.
"""

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.problem import NO_MAIN_GRADS, Forward, Gradients, MainGrads, Needs, Problem
from moesaic.ops.layout import is_transposed
from moesaic.ops.triton import available


def forward(problem: Problem, save: bool) -> Forward:
    x, w1, w3, w2 = problem.x_TD, problem.w1_EDF, problem.w3_EDF, problem.w2_EFD
    up_projection, matmul, combine, routing = (
        available.load(name) for name in ("up_projection", "matmul", "combine", "routing")
    )
    with torch.cuda.device_of(x):
        routed = routing.route(problem.ids_TK, w1.shape[0])
        hidden = up_projection.up_projection(x, w1, w3, problem.b1_EF, problem.b3_EF, problem.activation, routed, save)
        y_RD = matmul.grouped_mm(matmul.Product(hidden.a, w2), routed.groups, x.dtype)
        z_TD = combine.combine(y_RD, routed.positions, problem.weights_TK)
    if not save:
        return Forward(z_TD, None, None)
    return Forward(z_TD, hidden.h1, None if w3 is None else hidden.h3)


def backward(
    grad_TD: Tensor,
    problem: Problem,
    h1_TKF: Tensor,
    h3_TKF: Tensor | None,
    needs: Needs,
    into: MainGrads = NO_MAIN_GRADS,
) -> Gradients:
    x, w1, w3, w2 = problem.x_TD, problem.w1_EDF, problem.w3_EDF, problem.w2_EFD
    down_gradient, matmul, weight_grad, combine, routing = (
        available.load(name) for name in ("down_gradient", "matmul", "weight_grad", "combine", "routing")
    )
    Product = matmul.Product
    has_b1 = needs.b1 and problem.b1_EF is not None
    has_b3 = needs.b3 and problem.b3_EF is not None
    gx = gweights = gw1 = gw3 = gw2 = gb1 = gb3 = None
    with torch.cuda.device_of(x):
        routed = routing.route(problem.ids_TK, w1.shape[0])

        def sums(w: Tensor, rows: Tensor, rows_of: Tensor | None, grad: Tensor, grad_of: Tensor | None) -> Tensor:
            """The gradient of a weight, lying in memory as that does."""
            if is_transposed(w):
                return sums(w.mT, grad, grad_of, rows, rows_of).mT
            return weight_grad.weight_grad(rows, grad, routed.groups, w.dtype, x_rows=rows_of, grad_rows=grad_of)

        def add(into: Tensor, rows: Tensor, rows_of: Tensor | None, grad: Tensor, grad_of: Tensor | None) -> None:
            if is_transposed(into):
                add(into.mT, grad, grad_of, rows, rows_of)
            else:
                weight_grad.weight_grad_into(into, rows, grad, routed.groups, x_rows=rows_of, grad_rows=grad_of)

        weighted = needs.w2 or into.w2 is not None
        wanted = down_gradient.Wanted(routing_weights=needs.weights, weighted=weighted, biases=has_b1 or has_b3)
        hidden = down_gradient.down_gradient(
            grad_TD, w2, h1_TKF, h3_TKF, problem.weights_TK, problem.activation, routed, wanted
        )
        if needs.weights:
            gweights = hidden.weights.to(problem.weights_TK.dtype)
        if needs.w2:
            gw2 = sums(w2, hidden.weighted, None, grad_TD, routed.tokens)
        if needs.w1:
            gw1 = sums(w1, x, routed.tokens, hidden.gh1, None)
        if needs.w3 and w3 is not None:
            gw3 = sums(w3, x, routed.tokens, hidden.gh3, None)
        if into.w2 is not None:
            add(into.w2, hidden.weighted, None, grad_TD, routed.tokens)
        if into.w1 is not None:
            add(into.w1, x, routed.tokens, hidden.gh1, None)
        if into.w3 is not None:
            add(into.w3, x, routed.tokens, hidden.gh3, None)
        if needs.x:
            plus = None if w3 is None else Product(hidden.gh3, w3.mT)
            gx_RD = matmul.grouped_mm(Product(hidden.gh1, w1.mT), routed.groups, x.dtype, plus=plus)
            gx = combine.combine(gx_RD, routed.positions, None)
        if has_b1:
            gb1 = hidden.b1.to(x.dtype)
        if has_b3:
            gb3 = hidden.b3.to(x.dtype)
    return Gradients(gx, gweights, gw1, gw3, gw2, gb1, gb3)
