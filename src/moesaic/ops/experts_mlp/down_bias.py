"""The down projection's bias for implementations whose kernels do not have it: added to what they give.

Gathered copy by copy, and its gradient summed expert by expert, so that a bias that is not finite stays with the tokens
of its expert.

Legend: T tokens, K copies a token (top-k), D model dim, E experts, R = T * K rows sorted by expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.problem import Gradients, Problem, Wanted
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.grouped_mm.impl import torch as grouped
from moesaic.ops.permute import kernels as permuting


def add_down_bias(z_TD: Tensor, problem: Problem) -> Tensor:
    """``z[t] + sum over k of weights[t, k] * b2[ids[t, k]]``."""
    b_ED = problem.down.bias
    if b_ED is None:
        return z_TD
    sum_TD = z_TD.to(accumulation_dtype(z_TD.dtype))
    weights_TK = problem.weights_TK.to(sum_TD.dtype).masked_fill(_is_absent(problem), 0)
    for rows_TD, weights_T in zip(_biases(problem, b_ED), weights_TK.unbind(1), strict=True):
        sum_TD = sum_TD + rows_TD * weights_T.unsqueeze(1)
    return sum_TD.to(z_TD.dtype)


def add_down_bias_gradients(found: Gradients, grad_TD: Tensor, problem: Problem, wanted: Wanted) -> Gradients:
    """The gradients with what the bias adds to those of the routing weights; its own goes to its target."""
    b_ED = problem.down.bias
    if b_ED is None:
        return found
    acc = accumulation_dtype(b_ED.dtype)
    if (target := wanted.down.bias) is not None:
        slots_R, positions_TK, sizes_E = permuting.sort_by_expert(
            problem.ids_TK, problem.num_experts, problem.ids_TK.numel()
        )
        # Long fp32 sums lose digits, where they are made in one chain.
        wide = torch.float64 if grad_TD.is_cpu else acc
        grad_RD = permuting.permute(grad_TD.to(wide), slots_R, positions_TK, problem.weights_TK)
        ones_R1 = grad_RD.new_ones(grad_RD.shape[0], 1)
        target.take(grouped.weight_grad(ones_R1, grad_RD, sizes_E.unsqueeze(0), problem.num_experts).squeeze(1))
    if found.weights_TK is None:
        return found
    dots_T = [(rows_TD * grad_TD.to(acc)).sum(1) for rows_TD in _biases(problem, b_ED)]
    added_TK = torch.stack(dots_T, 1) if dots_T else torch.zeros_like(found.weights_TK)
    return found._replace(
        weights_TK=found.weights_TK + added_TK.masked_fill_(_is_absent(problem), 0).to(found.weights_TK.dtype)
    )


def _is_absent(problem: Problem) -> Tensor:
    return (problem.ids_TK < 0) | (problem.ids_TK >= problem.num_experts)


def _biases(problem: Problem, b_ED: Tensor) -> Iterator[Tensor]:
    """Copy by copy the bias of each token's expert, in the accumulation dtype; zeros where there is none."""
    padded = torch.nn.functional.pad(b_ED.to(accumulation_dtype(b_ED.dtype)), (0, 0, 0, 1))
    rows_TK = torch.where(_is_absent(problem), b_ED.shape[0], problem.ids_TK)
    return (padded.index_select(0, rows_T) for rows_T in rows_TK.unbind(1))
