"""experts_mlp by the kernels of ``csrc/``: fp32 and bf16 on CPU, any strides.

No gathered copy of the tokens and no pass of its own for the activation: rows are gathered by the products that read
them, and the activation is applied to sums that have not left the cache. The same call gives the same bits, whatever
the number of threads.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, E experts.
"""

import torch
from torch import Tensor

from moesaic.ops import pool
from moesaic.ops.experts_mlp.activation import ACTIVATIONS
from moesaic.ops.experts_mlp.problem import NO_MAIN_GRADS, Forward, Gradients, MainGrads, Needs, Problem
from moesaic.ops.layout import is_transposed
from moesaic.ops.native import (
    DTYPES,
    CExperts,
    CExpertsGrads,
    CPreActivations,
    CProjectionGrads,
    CRouting,
    Kernels,
    check_status,
    loaded_kernels,
    matrix,
    pointer,
    projection,
)


def forward(problem: Problem, save: bool) -> Forward:
    library, isa = _kernels()
    x_TD, (T, K), F = problem.x_TD, problem.ids_TK.shape, problem.w1_EDF.shape[2]
    routing, keep = _routing(problem)
    z_TD = pool.empty(tuple(x_TD.shape), x_TD.dtype)
    h1_TKF = pool.empty((T, K, F), x_TD.dtype) if save else None
    h3_TKF = pool.empty((T, K, F), x_TD.dtype) if save and problem.w3_EDF is not None else None
    status = library.moesaic_cpu_experts(
        routing,
        _experts(problem),
        matrix(x_TD),
        z_TD.data_ptr(),
        CPreActivations(pointer(h1_TKF), pointer(h3_TKF)),
        isa,
        torch.get_num_threads(),
    )
    del keep
    check_status("experts_mlp", status)
    return Forward(z_TD, h1_TKF, h3_TKF)


def backward(
    grad_TD: Tensor,
    problem: Problem,
    h1_TKF: Tensor,
    h3_TKF: Tensor | None,
    needs: Needs,
    into: MainGrads = NO_MAIN_GRADS,
) -> Gradients:
    library, isa = _kernels()
    routing, keep = _routing(problem)
    h1_TKF, h3_TKF = h1_TKF.contiguous(), None if h3_TKF is None else h3_TKF.contiguous()
    p = problem
    given = (p.x_TD, p.weights_TK, p.w1_EDF, p.w3_EDF, p.w2_EFD, p.b1_EF, p.b3_EF)
    dtypes = (p.x_TD.dtype, torch.float32, *[p.x_TD.dtype] * 5)
    found = Gradients(
        *(
            _empty(t, dtype) if wanted and t is not None else None
            for t, dtype, wanted in zip(given, dtypes, needs, strict=True)
        )
    )
    gate = _gradients_of_projection(found.w1, found.b1, into.w1)
    up = _gradients_of_projection(found.w3, found.b3, into.w3)
    status = library.moesaic_cpu_experts_backward(
        routing,
        _experts(problem),
        matrix(p.x_TD),
        matrix(grad_TD),
        CPreActivations(pointer(h1_TKF), pointer(h3_TKF)),
        CExpertsGrads(
            pointer(found.x), pointer(found.weights), (gate, up), _gradients_of_projection(found.w2, None, into.w2)
        ),
        isa,
        torch.get_num_threads(),
    )
    del keep
    check_status("experts_mlp", status)
    return found._replace(weights=None if found.weights is None else found.weights.to(p.weights_TK.dtype))


def _kernels() -> Kernels:
    loaded = loaded_kernels()
    pool.limit(loaded)  # the kernels take their own memory from it
    return loaded


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """For a gradient, lying as its argument does if that is a transposed matrix."""
    if like.ndim == 3 and is_transposed(like):
        return pool.empty(tuple(like.mT.shape), dtype).mT
    return pool.empty(tuple(like.shape), dtype)


def _gradients_of_projection(w: Tensor | None, b: Tensor | None, into: Tensor | None) -> CProjectionGrads:
    """Where to put them; that of the weight is added to ``into`` if that is given."""
    to = w if into is None else into
    return CProjectionGrads(pointer(to), pointer(b), to is not None and is_transposed(to), into is not None)


def _routing(problem: Problem) -> tuple[CRouting, tuple[Tensor, Tensor]]:
    # The second result owns the memory that the first points to.
    ids_TK = problem.ids_TK.to(torch.int64).contiguous()
    weights_TK = problem.weights_TK.to(torch.float32).contiguous()
    return CRouting(ids_TK.data_ptr(), weights_TK.data_ptr(), *ids_TK.shape), (ids_TK, weights_TK)


def _experts(problem: Problem) -> CExperts:
    projections = [projection(problem.w1_EDF, problem.b1_EF)]
    if problem.w3_EDF is not None:
        projections.append(projection(problem.w3_EDF, problem.b3_EF))
    return CExperts(
        tuple(projections),
        projection(problem.w2_EFD, None),
        *problem.w1_EDF.shape,
        len(projections),
        ACTIVATIONS.index(problem.activation),
        DTYPES[problem.x_TD.dtype],
    )
