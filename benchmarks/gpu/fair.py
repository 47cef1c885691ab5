"""What a careful user of ``torch._grouped_mm`` writes: the base that speeds are told against.

Gate and up projection are one product, activation and combine are compiled, counts stay on the device, and each
gradient of a gather is a gather and a sum.

Legend: T tokens, K copies a token, R = T * K rows sorted by expert, D model dim, F hidden dim, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu.common import DRY_RUN
from torch import Tensor


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For all sizes at once, each number of copies excepted: to compile for each would take most of the time."""
    if DRY_RUN:
        return function

    @functools.cache
    def compiled() -> Callable[..., Any]:
        # Past the limit a function would run uncompiled, and this would be no fair base any more.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(function, dynamic=True)

    return lambda *args: compiled()(*args)


@_compiled
def _activate(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, 1)
    return F.silu(gate) * up


@_compiled
def _sum_copies(rows: Tensor, positions: Tensor) -> Tensor:
    return sum(rows[of_copy].float() for of_copy in positions.unbind(1)).to(rows.dtype)


@_compiled
def _weigh_copies(rows: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    copies = zip(positions.unbind(1), weights.unbind(1), strict=True)
    return sum(rows[of_copy].float() * weight.unsqueeze(1) for of_copy, weight in copies).to(rows.dtype)


@_compiled
def _weigh_copies_backward(
    grad: Tensor, rows: Tensor, positions: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    of_rows = grad[order // positions.shape[1]].float() * weights.flatten()[order].unsqueeze(1)
    of_weights = [(rows[of_copy].float() * grad.float()).sum(1) for of_copy in positions.unbind(1)]
    return of_rows.to(rows.dtype), torch.stack(of_weights, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        return x[order // positions.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _sum_copies(grad, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, positions, order, weights)
        return _weigh_copies(rows, positions, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        of_rows, of_weights = _weigh_copies_backward(grad.contiguous(), *ctx.saved_tensors)
        return of_rows, None, None, of_weights


def fair(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """``[T, D]``; ``w13 [E, D, 2 F]`` is gate beside up."""
    (T, K), E = ids.shape, w13.shape[0]
    keys, order = torch.sort(ids.flatten(), stable=True)
    ends = torch.searchsorted(keys, torch.arange(E, device=ids.device), right=True, out_int32=True)
    rows = torch.arange(T * K, device=ids.device)
    positions = torch.empty_like(order).scatter_(0, order, rows).view(T, K)
    hidden = _activate(torch._grouped_mm(_Gather.apply(x, order, positions), w13, offs=ends))
    return _Combine.apply(torch._grouped_mm(hidden, w2, offs=ends), order, positions, weights)
