"""experts_mlp in plain PyTorch. This file is the definition, and the oracle of every test.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, r the copies of one expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.activation import hidden, slopes
from moesaic.ops.experts_mlp.problem import NO_MAIN_GRADS, Forward, Gradients, MainGrads, Needs, Problem
from moesaic.ops.grouped_mm.groups import accumulation_dtype


def forward(problem: Problem, save: bool) -> Forward:
    """``z[t] = sum over k of weights[t, k] * hidden(h1, h3) w2[e]``, ``h1 = x[t] w1[e] + b1[e]``, ``e = ids[t, k]``."""
    x, acc = problem.x_TD, accumulation_dtype(problem.x_TD.dtype)
    gate, up = _projections(problem)
    z_TD = x.new_zeros(x.shape, dtype=acc)
    h1_TKF = x.new_zeros(*problem.ids_TK.shape, problem.w1_EDF.shape[2])
    h3_TKF = None if up is None else torch.zeros_like(h1_TKF)
    for e, t, k in _copies(problem):
        h1_TKF[t, k] = gate.forward(x[t], e)
        if up is not None and h3_TKF is not None:
            h3_TKF[t, k] = up.forward(x[t], e)
        a_rF = hidden(problem.activation, h1_TKF[t, k], None if h3_TKF is None else h3_TKF[t, k])
        y_rD = a_rF.to(acc) @ problem.w2_EFD[e].to(acc)
        z_TD[t] += problem.weights_TK[t, k].to(acc).unsqueeze(1) * y_rD
    return Forward(z_TD.to(x.dtype), h1_TKF, h3_TKF) if save else Forward(z_TD.to(x.dtype), None, None)


def backward(
    grad_TD: Tensor,
    problem: Problem,
    h1_TKF: Tensor,
    h3_TKF: Tensor | None,
    needs: Needs,
    into: MainGrads = NO_MAIN_GRADS,
) -> Gradients:
    """The gradients of :func:`forward`, by the chain rule."""
    x, acc, name = problem.x_TD, accumulation_dtype(problem.x_TD.dtype), problem.activation
    gate, up = _projections(problem)
    gx = torch.zeros_like(x, dtype=acc)
    gweights = torch.zeros_like(problem.weights_TK, dtype=acc)
    gw2 = torch.zeros_like(problem.w2_EFD, dtype=acc)
    for e, t, k in _copies(problem):
        h1_rF, grad_rD = h1_TKF[t, k].to(acc), grad_TD[t].to(acc)
        h3_rF = None if h3_TKF is None else h3_TKF[t, k].to(acc)
        a_rF = hidden(name, h1_TKF[t, k], None if h3_TKF is None else h3_TKF[t, k]).to(acc)
        weight_r1 = problem.weights_TK[t, k].to(acc).unsqueeze(1)
        ga_rF = grad_rD @ problem.w2_EFD[e].to(acc).mT
        gweights[t, k] = (ga_rF * a_rF).sum(1)
        gw2[e] += a_rF.mT @ (weight_r1 * grad_rD)
        ga_rF = weight_r1 * ga_rF
        slope1_rF, slope3_rF = slopes(name, h1_rF, h3_rF)
        gx[t] += gate.backward(x[t], ga_rF * slope1_rF, e)
        if up is not None and slope3_rF is not None:
            gx[t] += up.backward(x[t], ga_rF * slope3_rF, e)
    sums = (gate.w_grad, None if up is None else up.w_grad, gw2)
    for buffer, total in zip(into, sums, strict=True):
        if buffer is not None and total is not None:
            buffer += total
    found = Gradients(
        gx,
        gweights,
        gate.w_grad,
        None if up is None else up.w_grad,
        gw2,
        gate.b_grad,
        None if up is None else up.b_grad,
    )
    given = (x, problem.weights_TK, problem.w1_EDF, problem.w3_EDF, problem.w2_EFD, problem.b1_EF, problem.b3_EF)
    return Gradients(*(_cast(g, t) if need else None for g, t, need in zip(found, given, needs, strict=True)))


class _Projection:
    """``h = x w[e] + b[e]``, and the sums of its gradients."""

    def __init__(self, w_EDF: Tensor, b_EF: Tensor | None) -> None:
        self.acc = accumulation_dtype(w_EDF.dtype)
        self.w_EDF, self.b_EF = w_EDF, b_EF
        self.w_grad = torch.zeros_like(w_EDF, dtype=self.acc)
        self.b_grad = None if b_EF is None else torch.zeros_like(b_EF, dtype=self.acc)

    def forward(self, x_rD: Tensor, e: int) -> Tensor:
        h_rF = x_rD.to(self.acc) @ self.w_EDF[e].to(self.acc)
        return (h_rF if self.b_EF is None else h_rF + self.b_EF[e].to(self.acc)).to(x_rD.dtype)

    def backward(self, x_rD: Tensor, grad_rF: Tensor, e: int) -> Tensor:
        self.w_grad[e] += x_rD.to(self.acc).mT @ grad_rF
        if self.b_grad is not None:
            self.b_grad[e] += grad_rF.sum(0)
        return grad_rF @ self.w_EDF[e].to(self.acc).mT


def _projections(problem: Problem) -> tuple[_Projection, _Projection | None]:
    gate = _Projection(problem.w1_EDF, problem.b1_EF)
    return gate, None if problem.w3_EDF is None else _Projection(problem.w3_EDF, problem.b3_EF)


def _copies(problem: Problem) -> Iterator[tuple[int, Tensor, int]]:
    """Every expert with the tokens whose copy ``k`` goes to it; k outermost, so that sums over k have one order."""
    for k, ids_T in enumerate(problem.ids_TK.unbind(1)):
        for e in range(problem.w1_EDF.shape[0]):
            yield e, (ids_T == e).nonzero().squeeze(1), k


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    # zeros_like has made it lie as its argument does.
    return None if gradient is None or like is None else gradient.to(like.dtype)
