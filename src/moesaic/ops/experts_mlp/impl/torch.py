"""experts_mlp out of torch's own operations: rows sorted by expert, products as grouped_mm's ``torch`` has them.

Any dtype, any device; on CUDA no size is read to the host.

Legend: T tokens, K copies a token (top-k), R = T * K rows sorted by expert, those of copies that are not here at the
end, D model dim, F hidden dim, E experts.
"""

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.activation import hidden, slopes
from moesaic.ops.experts_mlp.problem import NO_MAIN_GRADS, Forward, Gradients, MainGrads, Needs, Problem
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.grouped_mm.impl import torch as grouped
from moesaic.ops.layout import is_transposed
from moesaic.ops.permute import kernels as permuting


class _Rows:
    """The copies of all tokens as rows sorted by expert."""

    def __init__(self, problem: Problem) -> None:
        ids_TK, E = problem.ids_TK, problem.w1_EDF.shape[0]
        self.slots_R, self.positions_TK, sizes_E = permuting.sort_by_expert(ids_TK, E, ids_TK.numel())
        self.sizes_1E = sizes_E.unsqueeze(0)

    def of_tokens(self, x_TD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        return permuting.permute(x_TD, self.slots_R, self.positions_TK, weights_TK)

    def to_tokens(self, y_RD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        return permuting.combine(y_RD, self.slots_R, self.positions_TK, weights_TK)

    def of_slots(self, h_TKF: Tensor) -> Tensor:
        if not h_TKF.numel():
            return h_TKF.flatten(0, 1)
        # Rows of copies that are not here come last and belong to no group: what they hold does not matter.
        return h_TKF.flatten(0, 1).index_select(0, self.slots_R.clamp(min=0))

    def to_slots(self, h_RF: Tensor) -> Tensor:
        T, K = self.positions_TK.shape
        if not h_RF.numel():
            return h_RF.unflatten(0, (T, K))
        h_TKF = h_RF.index_select(0, self.positions_TK.flatten().clamp(min=0)).unflatten(0, (T, K))
        return h_TKF.masked_fill_((self.positions_TK < 0).unsqueeze(2), 0)

    def times(self, x_RK: Tensor, w_EKN: Tensor, b_EN: Tensor | None = None) -> Tensor:
        """``x w[e] + b[e]``; the product is rounded first, for in a wider dtype all weights would be copied."""
        y_RN = grouped.forward(x_RK, w_EKN, self.sizes_1E, x_RK.dtype)
        if b_EN is None:
            return y_RN
        E, num_rows = b_EN.shape[0], x_RK.shape[0]
        # One more bias, of zeros, for the rows that belong to no expert.
        counts = torch.cat([self.sizes_1E[0], num_rows - self.sizes_1E.sum(1)])
        biases_R = torch.arange(E + 1, device=b_EN.device).repeat_interleave(counts, output_size=num_rows)
        padded = torch.nn.functional.pad(b_EN, (0, 0, 0, 1))
        return y_RN + padded.index_select(0, biases_R)

    def weight_grad(self, x_RK: Tensor, grad_RN: Tensor, w_EKN: Tensor) -> Tensor:
        if is_transposed(w_EKN):
            return grouped.weight_grad(grad_RN, x_RK, self.sizes_1E, w_EKN.shape[0]).mT
        return grouped.weight_grad(x_RK, grad_RN, self.sizes_1E, w_EKN.shape[0])

    def weight_grad_into(self, into_EKN: Tensor, x_RK: Tensor, grad_RN: Tensor) -> None:
        if is_transposed(into_EKN):
            grouped.weight_grad_into(into_EKN.mT, grad_RN, x_RK, self.sizes_1E)
        else:
            grouped.weight_grad_into(into_EKN, x_RK, grad_RN, self.sizes_1E)

    def bias_grad(self, grad_RN: Tensor, b_EN: Tensor) -> Tensor:
        ones_R1 = grad_RN.new_ones(grad_RN.shape[0], 1)
        return grouped.weight_grad(ones_R1, grad_RN, self.sizes_1E, b_EN.shape[0]).squeeze(1).to(b_EN.dtype)


def forward(problem: Problem, save: bool) -> Forward:
    rows = _Rows(problem)
    x_RD = rows.of_tokens(problem.x_TD)
    h1_RF = rows.times(x_RD, problem.w1_EDF, problem.b1_EF)
    h3_RF = None if problem.w3_EDF is None else rows.times(x_RD, problem.w3_EDF, problem.b3_EF)
    z_TD = rows.to_tokens(rows.times(hidden(problem.activation, h1_RF, h3_RF), problem.w2_EFD), problem.weights_TK)
    if not save:
        return Forward(z_TD, None, None)
    return Forward(z_TD, rows.to_slots(h1_RF), None if h3_RF is None else rows.to_slots(h3_RF))


def backward(
    grad_TD: Tensor,
    problem: Problem,
    h1_TKF: Tensor,
    h3_TKF: Tensor | None,
    needs: Needs,
    into: MainGrads = NO_MAIN_GRADS,
) -> Gradients:
    rows = _Rows(problem)
    dtype, acc = problem.x_TD.dtype, accumulation_dtype(problem.x_TD.dtype)
    h1_RF = rows.of_slots(h1_TKF)
    h3_RF = None if h3_TKF is None else rows.of_slots(h3_TKF)
    a_RF = hidden(problem.activation, h1_RF, h3_RF)
    weight_R1 = rows.of_slots(problem.weights_TK.unsqueeze(2)).to(acc)

    # Of the unweighted result: its product with the hidden row is the gradient of the weight.
    ga_RF = rows.times(rows.of_tokens(grad_TD), problem.w2_EFD.mT).to(acc)
    gweights = gw2 = gx = gw1 = gw3 = gb1 = gb3 = None
    if needs.weights:
        gweights = rows.to_slots((ga_RF * a_RF.to(acc)).sum(1, keepdim=True)).squeeze(2).to(problem.weights_TK.dtype)
    if needs.w2:
        gw2 = rows.weight_grad(a_RF, rows.of_tokens(grad_TD, problem.weights_TK), problem.w2_EFD)
    if into.w2 is not None:
        rows.weight_grad_into(into.w2, a_RF, rows.of_tokens(grad_TD, problem.weights_TK))
    ga_RF = ga_RF * weight_R1
    slope1_RF, slope3_RF = slopes(problem.activation, h1_RF.to(acc), None if h3_RF is None else h3_RF.to(acc))
    gh1_RF = (ga_RF * slope1_RF).to(dtype)
    gh3_RF = None if slope3_RF is None else (ga_RF * slope3_RF).to(dtype)

    if needs.x:
        gx_RD = rows.times(gh1_RF, problem.w1_EDF.mT)
        if problem.w3_EDF is not None and gh3_RF is not None:
            gx_RD += rows.times(gh3_RF, problem.w3_EDF.mT)
        gx = rows.to_tokens(gx_RD)
    wants_rows = needs.w1 or needs.w3 or into.w1 is not None or into.w3 is not None
    x_RD = rows.of_tokens(problem.x_TD) if wants_rows else None
    if x_RD is not None and into.w1 is not None:
        rows.weight_grad_into(into.w1, x_RD, gh1_RF)
    if x_RD is not None and into.w3 is not None and gh3_RF is not None:
        rows.weight_grad_into(into.w3, x_RD, gh3_RF)
    if x_RD is not None and needs.w1:
        gw1 = rows.weight_grad(x_RD, gh1_RF, problem.w1_EDF)
    if x_RD is not None and needs.w3 and problem.w3_EDF is not None and gh3_RF is not None:
        gw3 = rows.weight_grad(x_RD, gh3_RF, problem.w3_EDF)
    if needs.b1 and problem.b1_EF is not None:
        gb1 = rows.bias_grad(gh1_RF, problem.b1_EF)
    if needs.b3 and problem.b3_EF is not None and gh3_RF is not None:
        gb3 = rows.bias_grad(gh3_RF, problem.b3_EF)
    return Gradients(gx, gweights, gw1, gw3, gw2, gb1, gb3)
