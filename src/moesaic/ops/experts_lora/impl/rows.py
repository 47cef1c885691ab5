"""experts_lora out of grouped products: ``x w + (x a) b`` on rows sorted by expert, and no sum of weights is made.

With dropout ``(x a) b`` is that of rows of which some numbers are zero. w1 and w3 see the same rows.

Legend: T tokens, K copies a token (top-k), R rows sorted by expert, as many as lines L of pre-activations, those of
copies that are not here at the end, D model dim, F hidden dim, E experts, r the rank of an adapter; I and O the dims
that a projection comes from and goes to.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.experts_lora.dropout import HIDDEN, TOKENS, dropped, kept
from moesaic.ops.experts_lora.problem import Adapted, FactorGradients, Gradients, LowRank, Wanted
from moesaic.ops.experts_mlp.activation import hidden, slopes
from moesaic.ops.experts_mlp.impl.torch import Rows
from moesaic.ops.experts_mlp.problem import Forward, Projection
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.grouped_mm.implementations import module_for
from moesaic.ops.quantized.weight import Weight


class Mask(NamedTuple):
    """Which numbers of some rows stay; all if there is no dropout."""

    keep_RI: Tensor | None
    p: float

    def drop(self, x_RI: Tensor) -> Tensor:
        return x_RI if self.keep_RI is None else dropped(x_RI, self.keep_RI, self.p)


class _Products:
    """The grouped products of one call, and its masks."""

    def __init__(self, adapted: Adapted, impl: str | None) -> None:
        problem = adapted.base
        self.rows, self.impl = Rows(problem), impl
        self._sizes_1E, self._num_matrices = self.rows.sizes_E.unsqueeze(0), problem.num_experts
        self._dropout = adapted.dropout

    def mask(self, x_RI: Tensor, which: int, *used: LowRank | None) -> Mask:
        """What drops numbers of ``x``; nothing without dropout, or if no adapter uses it."""
        if self._dropout is None or not any(used):
            return Mask(None, 0.0)
        p, keys_TK, columns_F = self._dropout
        keys_R = self.rows.of_slots(keys_TK)
        columns_I = torch.arange(x_RI.shape[1], device=x_RI.device) if which == TOKENS else columns_F
        return Mask(kept(keys_R, columns_I, which, p), p)

    def forward(self, x_RI: Tensor, w_EIO: Weight) -> Tensor:
        module = module_for("grouped_mm", self.impl, (x_RI, w_EIO), self._sizes_1E, self._num_matrices)
        return module.forward(x_RI, w_EIO, self._sizes_1E, x_RI.dtype)

    def input_grad(self, grad_RO: Tensor, w_EIO: Weight) -> Tensor:
        module = module_for("grouped_mm_input_grad", self.impl, (grad_RO, w_EIO), self._sizes_1E, self._num_matrices)
        return module.forward(grad_RO, w_EIO.mT, self._sizes_1E, grad_RO.dtype)

    def weight_grad(self, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
        module = module_for("grouped_mm_weight_grad", self.impl, (x_RI, grad_RO), self._sizes_1E, self._num_matrices)
        return module.weight_grad(x_RI, grad_RO, self._sizes_1E, self._num_matrices)

    def project(self, x_RI: Tensor, dropped_RI: Tensor, projection: Projection, factors: LowRank | None) -> Tensor:
        """``x w + (dropped a) b + bias``, summed in the accumulation dtype and rounded to that of ``x``."""
        y_RO = self.forward(x_RI, projection.weight)
        if factors is None:
            return self.rows.add_bias(y_RO, projection.bias)
        added_RO = self.forward(self.forward(dropped_RI, factors.a), factors.b)
        if projection.bias is None:
            # One pass: torch adds numbers of half types in fp32, and rounds once.
            return y_RO.add_(added_RO)
        acc = accumulation_dtype(x_RI.dtype)
        return self.rows.add_bias(y_RO.to(acc) + added_RO, projection.bias.to(acc)).to(x_RI.dtype)

    def back(self, grad_RO: Tensor, mask: Mask, projection: Projection, factors: LowRank | None) -> Tensor:
        """The gradient of :meth:`project` by its rows: ``grad w^T + (grad b^T) a^T``, summed as there.

        The second one is that of the rows that were dropped.
        """
        gx_RI = self.input_grad(grad_RO, projection.weight)
        if factors is None:
            return gx_RI
        return gx_RI.add_(mask.drop(self.input_grad(self.input_grad(grad_RO, factors.b), factors.a)))

    def of_factors(self, x_RI: Tensor, grad_RO: Tensor, factors: LowRank | None) -> FactorGradients | None:
        """``ga = x^T (grad b^T)`` and ``gb = (x a)^T grad``, expert by expert, of rows ``x`` that were dropped."""
        if factors is None:
            return None
        ga = self.weight_grad(x_RI, self.input_grad(grad_RO, factors.b))
        return FactorGradients(ga, self.weight_grad(self.forward(x_RI, factors.a), grad_RO))


def forward(adapted: Adapted, save: bool, impl: str | None) -> Forward:
    problem, products = adapted.base, _Products(adapted, impl)
    rows = products.rows
    x_RD = rows.of_tokens(problem.x_TD)
    dropped_RD = products.mask(x_RD, TOKENS, *adapted.up).drop(x_RD)
    pre = [products.project(x_RD, dropped_RD, p, f) for p, f in zip(problem.projections, adapted.up, strict=True)]
    a_RF = hidden(problem.activation, pre)
    dropped_RF = products.mask(a_RF, HIDDEN, adapted.down).drop(a_RF)
    y_RD = products.project(a_RF, dropped_RF, problem.down, adapted.down)
    return Forward(rows.to_tokens(y_RD, problem.weights_TK), tuple(map(rows.to_lines, pre)) if save else ())


def backward(grad_TD: Tensor, adapted: Adapted, pre: tuple[Tensor, ...], wanted: Wanted, impl: str | None) -> Gradients:
    problem, products = adapted.base, _Products(adapted, impl)
    rows, down = products.rows, problem.down
    dtype, acc = problem.x_TD.dtype, accumulation_dtype(problem.x_TD.dtype)
    pre_RF = [rows.of_lines(h_LF) for h_LF in pre]
    a_RF = hidden(problem.activation, pre_RF)
    grad_RD = rows.of_tokens(grad_TD)

    # Of the unweighted result: its product with the hidden row is the gradient of the weight.
    mask_RF = products.mask(a_RF, HIDDEN, adapted.down)
    ga_RF = products.back(grad_RD, mask_RF, down, adapted.down)
    gweights_TK = gx_TD = None
    if wanted.weights:
        gweights_R = (ga_RF * a_RF.to(acc)).sum(1)
        if down.bias is not None:
            gweights_R += (grad_RD.to(acc) * rows.of_experts(down.bias).to(acc)).sum(1)
        gweights_TK = rows.to_slots(gweights_R).to(problem.weights_TK.dtype)
    of_down = None
    if wanted.factors:
        of_down = products.of_factors(mask_RF.drop(a_RF), rows.of_tokens(grad_TD, problem.weights_TK), adapted.down)
    ga_RF = ga_RF * rows.of_slots(problem.weights_TK).unsqueeze(1).to(acc)

    x_RD = rows.of_tokens(problem.x_TD)
    mask_RD = products.mask(x_RD, TOKENS, *adapted.up)
    dropped_RD = mask_RD.drop(x_RD)
    gx_RD: Tensor | None = None
    of_up: list[FactorGradients | None] = []
    slopes_RF = slopes(problem.activation, [h_RF.to(acc) for h_RF in pre_RF])
    for slope_RF, up, factors in zip(slopes_RF, problem.projections, adapted.up, strict=True):
        gh_RF = (ga_RF * slope_RF).to(dtype)
        of_up.append(products.of_factors(dropped_RD, gh_RF, factors) if wanted.factors else None)
        if wanted.x:
            of_one_RD = products.back(gh_RF, mask_RD, up, factors)
            gx_RD = of_one_RD if gx_RD is None else gx_RD.add_(of_one_RD)
    if gx_RD is not None:
        gx_TD = rows.to_tokens(gx_RD)
    return Gradients(gx_TD, gweights_TK, tuple(of_up), of_down)
