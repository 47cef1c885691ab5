"""experts_mlp by the kernels of ``csrc/``: fp32 and bf16 on CPU, any strides.

No gathered copy of the tokens and no pass of its own for the activation: rows are gathered by the products that read
them, and the activation is applied to sums that have not left the cache. The same call gives the same bits, whatever
the number of threads.

Legend: T tokens, K copies a token (top-k), L lines of the pre-activations, D model dim, F hidden dim, E experts.
"""

import torch
from torch import Tensor

from moesaic.ops import pool
from moesaic.ops.experts_mlp.activation import ACTIVATIONS
from moesaic.ops.experts_mlp.problem import Forward, Gradients, Problem, Targets, Wanted
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
    x_TD = problem.x_TD
    routing, keep = _routing(problem)
    z_TD = pool.empty(tuple(x_TD.shape), x_TD.dtype)
    sizes = [(problem.num_lines, up.weight.shape[2]) for up in problem.projections]
    pre = tuple(pool.empty(size, x_TD.dtype) for size in sizes) if save else ()
    status = library.moesaic_cpu_experts(
        routing,
        _experts(problem),
        matrix(x_TD),
        z_TD.data_ptr(),
        CPreActivations(*map(pointer, pre)),
        isa,
        torch.get_num_threads(),
    )
    del keep
    check_status("experts_mlp", status)
    return Forward(z_TD, pre)


def backward(grad_TD: Tensor, problem: Problem, pre: tuple[Tensor, ...], wanted: Wanted) -> Gradients:
    library, isa = _kernels()
    x_TD, weights_TK = problem.x_TD, problem.weights_TK
    routing, keep = _routing(problem)
    pre = tuple(h_LF.contiguous() for h_LF in pre)
    gx_TD = pool.empty(tuple(x_TD.shape), x_TD.dtype) if wanted.x else None
    gweights_TK = torch.empty(weights_TK.shape, dtype=torch.float32) if wanted.weights else None
    status = library.moesaic_cpu_experts_backward(
        routing,
        _experts(problem),
        matrix(x_TD),
        matrix(grad_TD),
        CPreActivations(*map(pointer, pre)),
        CExpertsGrads(
            pointer(gx_TD), pointer(gweights_TK), tuple(map(_targets, wanted.projections)), _targets(wanted.down)
        ),
        isa,
        torch.get_num_threads(),
    )
    del keep
    check_status("experts_mlp", status)
    return Gradients(gx_TD, None if gweights_TK is None else gweights_TK.to(weights_TK.dtype))


def _kernels() -> Kernels:
    loaded = loaded_kernels()
    pool.limit(loaded)  # the kernels take their own memory from it
    return loaded


def _targets(targets: Targets) -> CProjectionGrads:
    weight, bias = targets
    return CProjectionGrads(
        None if weight is None else pointer(weight.memory()),
        None if bias is None else pointer(bias.memory()),
        weight is not None and weight.is_transposed,
        weight is not None and weight.adds,
    )


def _routing(problem: Problem) -> tuple[CRouting, tuple[Tensor | None, ...]]:
    # The second result owns the memory that the first points to.
    ids_TK = problem.ids_TK.to(torch.int64).contiguous()
    weights_TK = problem.weights_TK.to(torch.float32).contiguous()
    lines_TK = None if problem.listed is None else problem.listed.lines_TK
    routing = CRouting(ids_TK.data_ptr(), weights_TK.data_ptr(), *ids_TK.shape, pointer(lines_TK), problem.num_lines)
    return routing, (ids_TK, weights_TK, lines_TK)


def _experts(problem: Problem) -> CExperts:
    return CExperts(
        tuple(projection(*up) for up in problem.projections),
        projection(*problem.down),
        problem.num_experts,
        *problem.projections[0].weight.shape[1:],
        len(problem.projections),
        ACTIVATIONS.index(problem.activation),
        DTYPES[problem.x_TD.dtype],
    )
