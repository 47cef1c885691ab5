"""experts_mlp out of torch's own operations: rows sorted by expert, products as grouped_mm's ``torch`` has them.

Any dtype, any device; on CUDA no size is read to the host.

Legend: T tokens, K copies a token (top-k), R = T * K rows sorted by expert, those of copies that are not here at the
end, D model dim, F hidden dim, E experts; I and O the dims that a projection comes from and goes to.
"""

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.activation import hidden, slopes
from moesaic.ops.experts_mlp.problem import Forward, Gradients, Problem, Targets, Wanted
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.grouped_mm.impl import torch as grouped
from moesaic.ops.permute import kernels as permuting


class Rows:
    """The copies of all tokens as rows sorted by expert."""

    def __init__(self, problem: Problem) -> None:
        ids_TK, E = problem.ids_TK, problem.num_experts
        self.slots_R, self.positions_TK, self.sizes_E = permuting.sort_by_expert(ids_TK, E, ids_TK.numel())
        self.products = grouped.Products(ids_TK, ids_TK.numel(), self.sizes_E.unsqueeze(0), E)

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

    def of_experts(self, b_EO: Tensor) -> Tensor:
        """For every row the bias of its expert; zeros for the rows that belong to no expert."""
        (E, _), num_rows = b_EO.shape, self.slots_R.shape[0]
        counts = torch.cat([self.sizes_E, num_rows - self.sizes_E.sum(0, keepdim=True)])
        experts_R = torch.arange(E + 1, device=b_EO.device).repeat_interleave(counts, output_size=num_rows)
        return torch.nn.functional.pad(b_EO, (0, 0, 0, 1)).index_select(0, experts_R)

    def add_bias(self, y_RO: Tensor, b_EO: Tensor | None) -> Tensor:
        """The product is rounded first: in a wider dtype all weights would be copied."""
        return y_RO if b_EO is None else y_RO + self.of_experts(b_EO)

    def write_gradients(self, targets: Targets, x_RI: Tensor, grad_RO: Tensor) -> None:
        """Those of a projection, from the rows that it was applied to and the gradients of what it gave."""
        if (target := targets.weight) is not None:
            # In the dtype of the sum, else what is added would be rounded twice.
            x_RI, grad_of_sum_RO = x_RI.to(target.dtype), grad_RO.to(target.dtype)
            if target.is_transposed:
                target.take(self.products.weight_grad(grad_of_sum_RO, x_RI).mT)
            else:
                target.take(self.products.weight_grad(x_RI, grad_of_sum_RO))
        if (target := targets.bias) is not None:
            # Long fp32 sums lose digits, where they are made in one chain.
            wide_RO = grad_RO.double() if grad_RO.is_cpu else grad_RO
            ones_R1 = wide_RO.new_ones(wide_RO.shape[0], 1)
            target.take(self.products.weight_grad(ones_R1, wide_RO).squeeze(1))


def forward(problem: Problem, save: bool) -> Forward:
    rows = Rows(problem)
    product = rows.products.forward
    x_RD = rows.of_tokens(problem.x_TD)
    pre = []
    for up in problem.projections:
        h_RF = product(x_RD, up.weight, x_RD.dtype)
        pre.append(rows.add_bias(h_RF, up.bias))
    a_RF = hidden(problem.activation, pre)
    y_RD = rows.add_bias(product(a_RF, problem.down.weight, a_RF.dtype), problem.down.bias)
    z_TD = rows.to_tokens(y_RD, problem.weights_TK)
    return Forward(z_TD, tuple(map(rows.to_slots, pre)) if save else ())


def backward(grad_TD: Tensor, problem: Problem, pre: tuple[Tensor, ...], wanted: Wanted) -> Gradients:
    rows, down = Rows(problem), problem.down
    product = rows.products.forward
    dtype, acc = problem.x_TD.dtype, accumulation_dtype(problem.x_TD.dtype)
    pre_RF = [rows.of_slots(h_TKF) for h_TKF in pre]
    a_RF = hidden(problem.activation, pre_RF)
    grad_RD = rows.of_tokens(grad_TD)

    # Of the unweighted result: its product with the hidden row is the gradient of the weight.
    ga_RF = product(grad_RD, down.weight.mT, dtype).to(acc)
    gweights_TK = gx_TD = None
    if wanted.weights:
        gweights_R = (ga_RF * a_RF.to(acc)).sum(1)
        if down.bias is not None:
            gweights_R += (grad_RD.to(acc) * rows.of_experts(down.bias).to(acc)).sum(1)
        gweights_TK = rows.to_slots(gweights_R.unsqueeze(1)).squeeze(2).to(problem.weights_TK.dtype)
    if any(wanted.down):
        rows.write_gradients(wanted.down, a_RF, rows.of_tokens(grad_TD, problem.weights_TK))
    ga_RF = ga_RF * rows.of_slots(problem.weights_TK.unsqueeze(2)).to(acc)

    x_RD = rows.of_tokens(problem.x_TD) if any(up.weight for up in wanted.projections) else problem.x_TD
    gx_RD = None
    slopes_RF = slopes(problem.activation, [h_RF.to(acc) for h_RF in pre_RF])
    for slope_RF, up, targets in zip(slopes_RF, problem.projections, wanted.projections, strict=True):
        gh_RF = (ga_RF * slope_RF).to(dtype)
        rows.write_gradients(targets, x_RD, gh_RF)
        if wanted.x:
            of_one_RD = product(gh_RF, up.weight.mT, dtype)
            gx_RD = of_one_RD if gx_RD is None else gx_RD.add_(of_one_RD)
    if gx_RD is not None:
        gx_TD = rows.to_tokens(gx_RD)
    return Gradients(gx_TD, gweights_TK)
