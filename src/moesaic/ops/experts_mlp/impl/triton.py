"""experts_mlp by Triton kernels: fp32, bf16 and fp16 on GPUs of compute capability 8.0 and later, any strides.

Forward: gather, both up projections and the activation in one kernel, the down projection, and a gather-sum. Backward:
the gradient of the hidden rows with those of the activation and of the routing weights in one kernel, the gather fused
in the weight gradients, and a gather-sum again. No sum is made by atomics; nothing of the routing is read to the host,
so a call can be captured in a CUDA graph and replayed with another routing.

Legend: T tokens, K copies a token (top-k), R rows sorted by expert, as many as lines L of pre-activations, D model dim,
F hidden dim, E experts.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.down_bias import add_down_bias, add_down_bias_gradients
from moesaic.ops.experts_mlp.problem import Forward, Gradients, Problem, Projection, Target, Wanted
from moesaic.ops.triton import available


def forward(problem: Problem, save: bool) -> Forward:
    problem, num_lines = _with_rows(problem), problem.num_lines
    x, (gate, up) = problem.x_TD, _gate_and_up(problem)
    up_projection, matmul, combine, routing = (
        available.load(name) for name in ("up_projection", "matmul", "combine", "routing")
    )
    with torch.cuda.device_of(x):
        routed = routing.route(problem.ids_TK, problem.num_experts, problem.listed)
        hidden = up_projection.up_projection(
            x, gate.weight, up.weight, gate.bias, up.bias, problem.activation, routed, save
        )
        y_RD = matmul.grouped_mm(matmul.Product(hidden.a, problem.down.weight), routed.groups, x.dtype)
        z_TD = add_down_bias(combine.combine(y_RD, routed.positions, problem.weights_TK), problem)
    pre = (hidden.h1, hidden.h3)[: len(problem.projections)] if save else ()
    if num_lines != problem.num_lines:
        pre = tuple(h_LF.new_zeros(num_lines, h_LF.shape[1]) for h_LF in pre)
    return Forward(z_TD, pre)


def backward(grad_TD: Tensor, problem: Problem, pre: tuple[Tensor, ...], wanted: Wanted) -> Gradients:
    problem = _with_rows(problem)
    x, w2 = problem.x_TD, problem.down.weight
    down_gradient, matmul, weight_grad, combine, routing = (
        available.load(name) for name in ("down_gradient", "matmul", "weight_grad", "combine", "routing")
    )
    gx_TD = gweights_TK = None
    with torch.cuda.device_of(x):
        routed = routing.route(problem.ids_TK, problem.num_experts, problem.listed)

        def write(target: Target | None, rows: Rows, grad: Rows) -> None:
            """The gradient of a weight: ``rows.T @ grad`` of every expert."""
            if target is None:
                return
            into = target.memory()
            if target.is_transposed:
                into, rows, grad = into.mT, grad, rows
            weight_grad.weight_grad_into(
                into, rows.data, grad.data, routed.groups, x_rows=rows.of, grad_rows=grad.of, adds=target.adds
            )

        hidden = down_gradient.down_gradient(
            grad_TD,
            w2,
            *(*(h_LF[: problem.num_lines] for h_LF in pre), None)[:2],
            problem.to_lines(problem.weights_TK, 0),
            problem.activation,
            routed,
            down_gradient.Wanted(
                routing_weights=wanted.weights,
                weighted=wanted.down.weight is not None,
                biases=any(targets.bias for targets in wanted.projections),
            ),
        )
        gradients = [(hidden.gh1, hidden.b1), (hidden.gh3, hidden.b3)][: len(pre)]
        if wanted.weights:
            gweights_TK = problem.to_slots(hidden.weights, 0).to(problem.weights_TK.dtype)
        write(wanted.down.weight, Rows(hidden.weighted), Rows(grad_TD, routed.tokens))
        for targets, (gh_RF, gb_EF) in zip(wanted.projections, gradients, strict=True):
            write(targets.weight, Rows(x, routed.tokens), Rows(gh_RF))
            if targets.bias is not None:
                targets.bias.take(gb_EF)
        if wanted.x:
            products = [
                matmul.Product(gh_RF, up.weight.mT)
                for up, (gh_RF, _) in zip(problem.projections, gradients, strict=True)
            ]
            gx_RD = matmul.grouped_mm(products[0], routed.groups, x.dtype, plus=(*products, None)[1])
            gx_TD = combine.combine(gx_RD, routed.positions, None)
        return add_down_bias_gradients(Gradients(gx_TD, gweights_TK), grad_TD, problem, wanted)


class Rows(NamedTuple):
    """Rows of ``data``, in order, or those that ``of`` numbers."""

    data: Tensor
    of: Tensor | None = None


def _with_rows(problem: Problem) -> Problem:
    """Without a slot, lines are of no copy and have no token to load: then there is no list."""
    return problem if problem.ids_TK.numel() else problem._replace(listed=None)


def _gate_and_up(problem: Problem) -> tuple[Projection, ...]:
    # The kernels take None for the weight of a projection that is not there.
    nothing: Any = Projection(cast("Any", None))
    return (*problem.projections, nothing)[:2]
