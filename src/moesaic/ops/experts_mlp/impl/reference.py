"""experts_mlp in plain PyTorch. This file is the definition, and the oracle of every test.

Legend: T tokens, K copies a token (top-k), L lines of pre-activations, D model dim, F hidden dim, r the copies of one
expert; I and O the dims that a projection comes from and goes to.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.activation import hidden, slopes
from moesaic.ops.experts_mlp.problem import Forward, Gradients, Problem, Projection, Targets, Wanted
from moesaic.ops.grouped_mm.groups import accumulation_dtype


def forward(problem: Problem, save: bool) -> Forward:
    """``z[t] = sum over k of weights[t, k] * (hidden(h) w2[e] + b2[e])``, where ``e = ids[t, k]``.

    ``h`` is ``x[t] w1[e] + b1[e]``; with a gate there is another, of w3 and b3.
    """
    x, weights_TK, acc = problem.x_TD, problem.weights_TK, accumulation_dtype(problem.x_TD.dtype)
    z_TD = x.new_zeros(x.shape, dtype=acc)
    pre = tuple(x.new_zeros(problem.num_lines, p.weight.shape[2]) for p in problem.projections)
    for e, t, k, line in _copies(problem):
        for h_LF, projection in zip(pre, problem.projections, strict=True):
            h_LF[line] = _project(x[t], projection, e).to(x.dtype)
        a_rF = hidden(problem.activation, [h_LF[line] for h_LF in pre])
        z_TD[t] += weights_TK[t, k].to(acc).unsqueeze(1) * _project(a_rF, problem.down, e)
    return Forward(z_TD.to(x.dtype), pre if save else ())


def backward(grad_TD: Tensor, problem: Problem, pre: tuple[Tensor, ...], wanted: Wanted) -> Gradients:
    """The gradients of :func:`forward`, by the chain rule."""
    x, weights_TK, acc = problem.x_TD, problem.weights_TK, accumulation_dtype(problem.x_TD.dtype)
    gx_TD = torch.zeros_like(x, dtype=acc)
    gweights_TK = torch.zeros_like(weights_TK, dtype=acc)
    down = _Sums(problem.down, wanted.down)
    projections = [_Sums(p, targets) for p, targets in zip(problem.projections, wanted.projections, strict=True)]
    for e, t, k, line in _copies(problem):
        grad_rD = grad_TD[t].to(acc)
        a_rF = hidden(problem.activation, [h_LF[line] for h_LF in pre])
        gweights_TK[t, k] = (grad_rD * _project(a_rF, problem.down, e)).sum(1)
        ga_rF = down.add(a_rF, weights_TK[t, k].to(acc).unsqueeze(1) * grad_rD, e)
        slopes_rF = slopes(problem.activation, [h_LF[line].to(acc) for h_LF in pre])
        for projection, slope_rF in zip(projections, slopes_rF, strict=True):
            gx_TD[t] += projection.add(x[t], ga_rF * slope_rF, e)
    for sums in (*projections, down):
        sums.write()
    return Gradients(
        gx_TD.to(x.dtype) if wanted.x else None, gweights_TK.to(weights_TK.dtype) if wanted.weights else None
    )


def _project(x_rI: Tensor, projection: Projection, e: int) -> Tensor:
    """``x w[e] + b[e]``, in the accumulation dtype."""
    acc = accumulation_dtype(x_rI.dtype)
    y_rO = x_rI.to(acc) @ projection.weight[e].to(acc)
    return y_rO if projection.bias is None else y_rO + projection.bias[e].to(acc)


class _Sums:
    """The gradients of a projection that are wanted, summed in the accumulation dtype."""

    def __init__(self, projection: Projection, targets: Targets) -> None:
        self.weight_EIO, self.targets, self.acc = (
            projection.weight,
            targets,
            accumulation_dtype(projection.weight.dtype),
        )
        (E, I, O), device = self.weight_EIO.shape, self.weight_EIO.device  # noqa: E741
        self.sums = tuple(
            None if target is None else torch.zeros(shape, dtype=self.acc, device=device)
            for target, shape in zip(targets, ((E, I, O), (E, O)), strict=True)
        )

    def add(self, x_rI: Tensor, grad_rO: Tensor, e: int) -> Tensor:
        """Add what some rows contribute. Returns the gradient of the rows."""
        of_weight_EIO, of_bias_EO = self.sums
        if of_weight_EIO is not None:
            of_weight_EIO[e] += x_rI.to(self.acc).mT @ grad_rO
        if of_bias_EO is not None:
            of_bias_EO[e] += grad_rO.sum(0)
        return grad_rO @ self.weight_EIO[e].to(self.acc).mT

    def write(self) -> None:
        for target, total in zip(self.targets, self.sums, strict=True):
            if target is not None and total is not None:
                target.take(total)


def _copies(problem: Problem) -> Iterator[tuple[int, Tensor, int, Tensor]]:
    """Every expert with the tokens whose copy ``k`` goes to it, and the lines of these.

    k is outermost, so that sums over k have one order.
    """
    lines_TK = problem.to_slots(torch.arange(problem.num_lines, device=problem.ids_TK.device), -1)
    for k, (ids_T, lines_T) in enumerate(zip(problem.ids_TK.unbind(1), lines_TK.unbind(1), strict=True)):
        for e in range(problem.num_experts):
            t = (ids_T == e).nonzero().squeeze(1)
            yield e, t, k, lines_T[t]
