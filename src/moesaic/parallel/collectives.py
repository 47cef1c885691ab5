"""Uneven collectives with gradients. All of them are one all-to-all: exact sizes on the wire, gloo and NCCL alike.

Reductions are done here, in the order of ranks, after the all-to-all: deterministic, and as much on the wire as a
direct reduce-scatter sends. (gloo has no uneven reduce-scatter or all-gather, and NCCL's are loops of reductions.)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.sharding import internals


def all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, *, columns: int | None = None
) -> Tensor:
    """Send ``send[i]`` consecutive rows of ``x`` to rank ``i``; return the ``receive[i]`` rows of each rank, in order.

    The gradient goes back the same way. Rank ``i``'s ``send[j]`` has to be rank ``j``'s ``receive[i]``. With
    ``columns`` only the first so many of ``x [S, ...]`` have one, and no other travels.
    """
    return x if group.size() == 1 else _AllToAll.apply(x, list(send), list(receive), group, columns)


def all_gather_rows(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, *, columns: int | None = None) -> Tensor:
    """All ranks' rows, in rank order; rank ``i`` has ``sizes[i]``.

    The gradient is a :func:`reduce_scatter_rows`: every rank's gradient of the result is a part of the whole. With
    ``columns`` only the first so many of ``x [S, ...]`` have one.
    """
    return x if group.size() == 1 else _AllGatherRows.apply(x, list(sizes), group, columns)


def reduce_scatter_rows(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Sum ``x [sum(sizes), ...]`` over ranks and keep rank ``i``'s ``sizes[i]`` rows. Gradient: an all-gather."""
    return x if group.size() == 1 else _ReduceScatterRows.apply(x, list(sizes), group)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' ``x``, which have one shape, in rank order, one below the other. Without gradient."""
    return internals.all_gather(x.detach(), group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on every rank. Gradient: the same, for every rank's gradient of it is a part of the whole."""
    return x if group.size() == 1 else _SumOverRanks.apply(x, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, columns: int | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.columns = send, receive, group, columns
        return internals.all_to_all(x, receive, send, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad, others = _apart(grads[0], ctx.columns)
        back = internals.all_to_all(grad, ctx.send, ctx.receive, ctx.group)
        return _with_zeros(back, others), None, None, None, None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup, columns: int | None) -> Tensor:
        ctx.sizes, ctx.group, ctx.columns = sizes, group, columns
        return _gather(x, sizes, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, others = _apart(grads[0], ctx.columns)
        return _with_zeros(_reduce(grad, ctx.sizes, ctx.group), others), None, None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _reduce(x, sizes, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.sizes, ctx.group), None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return internals.all_reduce(x, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return internals.all_reduce(grads[0], ctx.group), None


def _apart(grad: Tensor, columns: int | None) -> tuple[Tensor, int]:
    """The columns that have a gradient, and how many others there are."""
    return (grad, 0) if columns is None else (grad[:, :columns], grad.shape[1] - columns)


def _with_zeros(grad: Tensor, others: int) -> Tensor:
    return torch.nn.functional.pad(grad, (0, others)) if others else grad


def _gather(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """An all-to-all in which every other rank gets the same; own rows stay here. Of two ranks ``x`` is what is sent."""
    n, rank, rows = group.size(), group.rank(), x.shape[0]
    sent = x if n == 2 else x.repeat(n - 1, *[1] * (x.ndim - 1))
    receive, send = ([0 if i == rank else size for i, size in enumerate(of)] for of in (sizes, [rows] * n))
    others = internals.all_to_all(sent, receive, send, group)
    before = sum(sizes[:rank])
    return torch.cat([others[:before], x, others[before:]])


def _reduce(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    n, mine = group.size(), sizes[group.rank()]
    parts = internals.all_to_all(x, [mine] * n, sizes, group)
    return parts.view(n, mine, *x.shape[1:]).sum(0)
