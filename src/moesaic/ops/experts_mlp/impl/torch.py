"""experts_mlp out of torch's own products, as grouped_mm's ``torch`` has them, on rows sorted by expert.

Any dtype, any device; on CUDA no size is read to the host. Between the products each pass over the rows reads and
writes once what it has to: :mod:`moesaic.ops.experts_mlp.passes`.

Legend: T tokens, K copies a token (top-k), R rows sorted by expert, as many as lines L of pre-activations, those of
copies that are not here at the end, D model dim, F hidden dim, E experts; I and O the dims that a projection comes from
and goes to.
"""

import torch
from torch import Tensor

from moesaic.ops.experts_mlp import passes
from moesaic.ops.experts_mlp.problem import Forward, Gradients, Problem, Targets, Wanted
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.grouped_mm.impl import torch as grouped
from moesaic.ops.permute import kernels as permuting

_ops = torch.ops.moesaic_passes


class Rows:
    """The copies of all tokens as rows sorted by expert.

    Attributes:
        slots_R, positions_TK, sizes_E: as in :class:`moesaic.ops.Permutation`.
        lines_R: the line of each row, -1 for none.
        positions_L: the row of each line, -1 for none.
    """

    def __init__(self, problem: Problem) -> None:
        ids_TK, E, R = problem.ids_TK, problem.num_experts, problem.num_lines
        self.slots_R, self.positions_TK, self.sizes_E = permuting.sort_by_expert(ids_TK, E, R)
        self.products = grouped.Products(ids_TK, R, self.sizes_E.unsqueeze(0), E)
        self.lines_R, self.positions_L = self.slots_R, problem.to_lines(self.positions_TK, -1)
        if problem.listed is not None:
            lines = passes.by_row(problem.listed.lines_TK.flatten(), self.slots_R)
            self.lines_R = torch.where(self.slots_R < 0, -1, lines)

    def of_tokens(self, x_TD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        return permuting.permute(x_TD, self.slots_R, self.positions_TK, weights_TK)

    def to_tokens(self, y_RD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        return permuting.combine(y_RD, self.slots_R, self.positions_TK, weights_TK)

    def of_lines(self, h_LF: Tensor) -> Tensor:
        # Rows of copies that are not here come last and belong to no group: what they hold does not matter.
        return passes.by_row(h_LF, self.lines_R)

    def to_lines(self, h_RF: Tensor) -> Tensor:
        return passes.by_slot(h_RF, self.positions_L)

    def of_slots(self, t_TK: Tensor) -> Tensor:
        return passes.by_row(t_TK.flatten(), self.slots_R)

    def to_slots(self, t_R: Tensor) -> Tensor:
        return passes.by_slot(t_R.unsqueeze(1), self.positions_TK.flatten()).view(self.positions_TK.shape)

    def of_experts(self, b_EO: Tensor) -> Tensor:
        """For every row the bias of its expert; zeros for the rows that belong to no expert."""
        (E, _), num_rows = b_EO.shape, self.slots_R.shape[0]
        counts = torch.cat([self.sizes_E, num_rows - self.sizes_E.sum(0, keepdim=True)])
        experts_R = torch.arange(E + 1, device=b_EO.device).repeat_interleave(counts, output_size=num_rows)
        return torch.nn.functional.pad(b_EO, (0, 0, 0, 1)).index_select(0, experts_R)

    def add_bias(self, y_RO: Tensor, b_EO: Tensor | None) -> Tensor:
        """The product is rounded first: in a wider dtype all weights would be copied."""
        return y_RO if b_EO is None else y_RO + self.of_experts(b_EO)

    def write_gradients(self, targets: Targets, x_RI: Tensor, grad_RO: Tensor, weights_R: Tensor | None = None) -> None:
        """Those of a projection, from the rows that it was applied to and the gradients of what it gave.

        With ``weights_R`` these are of results that are not weighted yet, and ``x_RI`` are rows that are.
        """
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
            # So many columns that a library's kernel finds them aligned.
            columns = 1 if grad_RO.is_cpu else 16 // grad_RO.element_size()
            rows_R = wide_RO.new_ones(len(wide_RO)) if weights_R is None else weights_R.to(wide_RO.dtype)
            rows_Rc = rows_R.unsqueeze(1).expand(-1, columns).contiguous()
            target.take(self.products.weight_grad(rows_Rc, wide_RO)[:, 0])


def forward(problem: Problem, save: bool) -> Forward:
    rows, up = Rows(problem), problem.projections
    product, where = rows.products.of_rows, (rows.slots_R, rows.positions_TK)
    x_RD = passes.of_tokens(problem.x_TD, *where)
    ids_L = problem.to_lines(problem.ids_TK, -1)
    h1_RF, h3_RF = (*(product(x_RD, p.weight) for p in up), None)[:2]
    b1_EF, b3_EF = (*(p.bias for p in up), None)[:2]
    lines_R, positions_L = rows.lines_R, rows.positions_L
    a_RF, *kept_LF = _ops.hidden(h1_RF, h3_RF, b1_EF, b3_EF, ids_L, lines_R, positions_L, problem.activation, save)
    y_RD = product(a_RF, problem.down.weight)
    z_TD = _ops.to_tokens(y_RD, None, problem.weights_TK, problem.down.bias, problem.ids_TK, *where)
    return Forward(z_TD, tuple(kept_LF[: len(up)]) if save else ())


def backward(grad_TD: Tensor, problem: Problem, pre: tuple[Tensor, ...], wanted: Wanted) -> Gradients:
    rows, down = Rows(problem), problem.down
    product, where = rows.products.of_rows, (rows.slots_R, rows.positions_TK)
    grad_RD = passes.of_tokens(grad_TD, *where)
    weights_L = problem.to_lines(problem.weights_TK, 0)

    # Of the unweighted result: its product with the hidden row is the gradient of the weight.
    ga_RF = product(grad_RD, down.weight.mT)
    *gh_RF, weighted_RF, gweights_L = _ops.hidden_gradient(
        ga_RF, *(*pre, None)[:2], weights_L, rows.lines_R, rows.positions_L, problem.activation
    )
    gweights_TK = gx_TD = None
    if wanted.weights:
        gweights_TK = problem.to_slots(gweights_L, 0)
        if down.bias is not None:
            gweights_TK = gweights_TK + _dots_with_biases(grad_TD, problem, down.bias)
        gweights_TK = gweights_TK.to(problem.weights_TK.dtype)
    if any(wanted.down):
        rows.write_gradients(wanted.down, weighted_RF, grad_RD, rows.of_slots(problem.weights_TK))
    x_RD = None
    if any(up.weight for up in wanted.projections):
        x_RD = passes.of_tokens(problem.x_TD, *where)
    terms = []
    for gh, up, targets in zip(gh_RF, problem.projections, wanted.projections, strict=False):
        rows.write_gradients(targets, gh if x_RD is None else x_RD, gh)
        if wanted.x:
            terms.append(product(gh, up.weight.mT))
    if terms:
        gx_TD = _ops.to_tokens(*(*terms, None)[:2], None, None, problem.ids_TK, *where)
    return Gradients(gx_TD, gweights_TK)


def _dots_with_biases(grad_TD: Tensor, problem: Problem, b_ED: Tensor) -> Tensor:
    """``<grad[t], b[ids[t, k]]>``, 0 for copies that are not here."""
    acc = accumulation_dtype(grad_TD.dtype)
    is_here = (problem.ids_TK >= 0) & (problem.ids_TK < len(b_ED))
    if not len(b_ED):
        return grad_TD.new_zeros(is_here.shape, dtype=acc)
    dots_TE = grad_TD.to(acc) @ b_ED.to(acc).mT
    ids_TK = torch.where(is_here, problem.ids_TK, 0).to(torch.int64)
    return dots_TE.gather(1, ids_TK).masked_fill(~is_here, 0)
