"""experts_lora out of grouped products: ``x w + (x a) b`` on rows sorted by expert, and no sum of weights is made.

Legend: T tokens, K copies a token (top-k), R = T * K rows sorted by expert, those of copies that are not here at the
end, D model dim, F hidden dim, E experts, r the rank of an adapter; I and O the dims that a projection comes from and
goes to.
"""

from torch import Tensor

from moesaic.ops.experts_lora.problem import Adapted, FactorGradients, Gradients, LowRank, Wanted
from moesaic.ops.experts_mlp.activation import hidden, slopes
from moesaic.ops.experts_mlp.impl.torch import Rows
from moesaic.ops.experts_mlp.problem import Forward, Problem, Projection
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.grouped_mm.implementations import module_for
from moesaic.ops.quantized.weight import Weight


class _Products:
    """The grouped products of one call."""

    def __init__(self, problem: Problem, impl: str | None) -> None:
        self.rows, self.impl = Rows(problem), impl
        self._sizes_1E, self._num_matrices = self.rows.sizes_E.unsqueeze(0), problem.num_experts

    def forward(self, x_RI: Tensor, w_EIO: Weight) -> Tensor:
        module = module_for("grouped_mm", self.impl, (x_RI, w_EIO), self._sizes_1E, self._num_matrices)
        return module.forward(x_RI, w_EIO, self._sizes_1E, x_RI.dtype)

    def input_grad(self, grad_RO: Tensor, w_EIO: Weight) -> Tensor:
        module = module_for("grouped_mm_input_grad", self.impl, (grad_RO, w_EIO), self._sizes_1E, self._num_matrices)
        return module.forward(grad_RO, w_EIO.mT, self._sizes_1E, grad_RO.dtype)

    def weight_grad(self, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
        module = module_for("grouped_mm_weight_grad", self.impl, (x_RI, grad_RO), self._sizes_1E, self._num_matrices)
        return module.weight_grad(x_RI, grad_RO, self._sizes_1E, self._num_matrices)

    def project(self, x_RI: Tensor, projection: Projection, factors: LowRank | None) -> Tensor:
        """``x w + (x a) b + bias``, summed in the accumulation dtype and rounded to that of ``x``."""
        y_RO = self.forward(x_RI, projection.weight)
        if factors is None:
            return self.rows.add_bias(y_RO, projection.bias)
        acc = accumulation_dtype(x_RI.dtype)
        y_RO = y_RO.to(acc) + self.forward(self.forward(x_RI, factors.a), factors.b)
        return self.rows.add_bias(y_RO, None if projection.bias is None else projection.bias.to(acc)).to(x_RI.dtype)

    def back(self, grad_RO: Tensor, projection: Projection, factors: LowRank | None) -> Tensor:
        """The gradient of :meth:`project` by its rows: ``grad w^T + (grad b^T) a^T``, in the accumulation dtype."""
        gx_RI = self.input_grad(grad_RO, projection.weight).to(accumulation_dtype(grad_RO.dtype))
        if factors is None:
            return gx_RI
        return gx_RI + self.input_grad(self.input_grad(grad_RO, factors.b), factors.a)

    def of_factors(self, x_RI: Tensor, grad_RO: Tensor, factors: LowRank | None) -> FactorGradients | None:
        """``ga = x^T (grad b^T)`` and ``gb = (x a)^T grad``, expert by expert."""
        if factors is None:
            return None
        ga = self.weight_grad(x_RI, self.input_grad(grad_RO, factors.b))
        return FactorGradients(ga, self.weight_grad(self.forward(x_RI, factors.a), grad_RO))


def forward(adapted: Adapted, save: bool, impl: str | None) -> Forward:
    problem, products = adapted.base, _Products(adapted.base, impl)
    rows = products.rows
    x_RD = rows.of_tokens(problem.x_TD)
    pre = [products.project(x_RD, p, f) for p, f in zip(problem.projections, adapted.up, strict=True)]
    y_RD = products.project(hidden(problem.activation, pre), problem.down, adapted.down)
    return Forward(rows.to_tokens(y_RD, problem.weights_TK), tuple(map(rows.to_slots, pre)) if save else ())


def backward(grad_TD: Tensor, adapted: Adapted, pre: tuple[Tensor, ...], wanted: Wanted, impl: str | None) -> Gradients:
    problem, products = adapted.base, _Products(adapted.base, impl)
    rows, down = products.rows, problem.down
    dtype, acc = problem.x_TD.dtype, accumulation_dtype(problem.x_TD.dtype)
    pre_RF = [rows.of_slots(h_TKF) for h_TKF in pre]
    a_RF = hidden(problem.activation, pre_RF)
    grad_RD = rows.of_tokens(grad_TD)

    # Of the unweighted result: its product with the hidden row is the gradient of the weight.
    ga_RF = products.back(grad_RD, down, adapted.down)
    gweights_TK = gx_TD = None
    if wanted.weights:
        gweights_R = (ga_RF * a_RF.to(acc)).sum(1)
        if down.bias is not None:
            gweights_R += (grad_RD.to(acc) * rows.of_experts(down.bias).to(acc)).sum(1)
        gweights_TK = rows.to_slots(gweights_R.unsqueeze(1)).squeeze(2).to(problem.weights_TK.dtype)
    of_down = None
    if wanted.factors:
        of_down = products.of_factors(a_RF, rows.of_tokens(grad_TD, problem.weights_TK), adapted.down)
    ga_RF = ga_RF * rows.of_slots(problem.weights_TK.unsqueeze(2)).to(acc)

    x_RD = rows.of_tokens(problem.x_TD)
    gx_RD: Tensor | None = None
    of_up: list[FactorGradients | None] = []
    slopes_RF = slopes(problem.activation, [h_RF.to(acc) for h_RF in pre_RF])
    for slope_RF, up, factors in zip(slopes_RF, problem.projections, adapted.up, strict=True):
        gh_RF = (ga_RF * slope_RF).to(dtype)
        of_up.append(products.of_factors(x_RD, gh_RF, factors) if wanted.factors else None)
        if wanted.x:
            of_one_RD = products.back(gh_RF, up, factors)
            gx_RD = of_one_RD if gx_RD is None else gx_RD + of_one_RD
    if gx_RD is not None:
        gx_TD = rows.to_tokens(gx_RD.to(dtype))
    return Gradients(gx_TD, gweights_TK, tuple(of_up), of_down)
