"""Uneven collectives with gradients. All of them are all-to-alls: exact sizes on the wire, gloo and NCCL alike.

Reductions are done here, in the order of ranks, after the all-to-all: deterministic, and as much on the wire as a
direct reduce-scatter sends. (gloo has no uneven reduce-scatter or all-gather, and NCCL's are loops of reductions.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def start_all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, *, columns: int | None = None
) -> Callable[[], Tensor]:
    """As :func:`all_to_all`, but what runs before the result is called for runs while rows are under way.

    In the backward pass that is what autograd runs between both ends. On CUDA collectives have a stream of their own.
    """
    if group.size() == 1 or torch.compiler.is_compiling():  # a compiler orders what it has traced
        x = all_to_all(x, send, receive, group, columns=columns)
        return lambda: x
    exchange = _Exchange(list(send), list(receive), group, columns)
    under_way = _Start.apply(x, exchange)
    return lambda: _Finish.apply(under_way, exchange)


def all_gather_rows(
    x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, *, columns: int | None = None, even: bool = False
) -> Tensor:
    """All ranks' rows, in rank order; rank ``i`` has ``sizes[i]``.

    The gradient is a :func:`reduce_scatter_rows`: every rank's gradient of the result is a part of the whole. With
    ``columns`` only the first so many of ``x [S, ...]`` have one. ``even`` says that all sizes are equal, which allows
    a single collective. It is not looked for: a compiler does not know sizes that were counted, and ranks that compile
    have to call what the others call.
    """
    return x if group.size() == 1 else _AllGatherRows.apply(x, list(sizes), group, columns, even)


def reduce_scatter_rows(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, *, even: bool = False) -> Tensor:
    """Sum ``x [sum(sizes), ...]`` over ranks and keep rank ``i``'s ``sizes[i]`` rows. Gradient: an all-gather."""
    return x if group.size() == 1 else _ReduceScatterRows.apply(x, list(sizes), group, even)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' ``x``, which have one shape, in rank order, one below the other. Without gradient."""
    return internals.all_gather(x.detach(), group)


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """As :func:`all_gather`, but what runs before the result is called for runs while ``x`` is under way."""
    if torch.compiler.is_compiling():  # a compiler orders what it has traced
        gathered = all_gather(x, group)
        return lambda: gathered
    under_way = internals.start_all_gather(x.detach(), group)
    return lambda: internals.wait(under_way)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on every rank. Gradient: the same, for every rank's gradient of it is a part of the whole."""
    return x if group.size() == 1 else _SumOverRanks.apply(x, group)


def sent_bytes() -> int:
    """How many bytes this process has sent to other ranks by the functions of this module, gradients included.

    Known from the sizes alone, on the host. What a compiler has traced does not count.
    """
    return _sent_bytes


_sent_bytes = 0


def _all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    _count(x, send, group)
    return internals.all_to_all(x, receive, send, group)


def _start_all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    _count(x, send, group)
    return internals.start_all_to_all(x, receive, send, group)


def _count(x: Tensor, send: Sequence[int], group: dist.ProcessGroup) -> None:
    global _sent_bytes
    if not torch.compiler.is_compiling():
        rows = sum(send) - send[group.rank()]
        _sent_bytes += rows * math.prod(x.shape[1:]) * x.element_size()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, columns: int | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.columns = send, receive, group, columns
        return _all_to_all(x, receive, send, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad, others = _apart(grads[0], ctx.columns)
        back = _all_to_all(grad, ctx.send, ctx.receive, ctx.group)
        return _with_zeros(back, others), None, None, None, None


@dataclass
class _Exchange:
    """One all-to-all, and the gradient that is under way."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup
    columns: int | None
    gradient: Tensor | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange, ctx.columns = exchange, x.shape[1:]
        return _start_all_to_all(x, exchange.receive, exchange.send, exchange.group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: _Exchange = ctx.exchange
        gradient, exchange.gradient = exchange.gradient, None
        assert gradient is not None
        others = 0 if exchange.columns is None else ctx.columns[0] - exchange.columns
        return _with_zeros(internals.wait(gradient), others), None


class _Finish(torch.autograd.Function):
    """Its gradient has other rows than what it is the gradient of, so it goes to ``_Start`` beside autograd."""

    @staticmethod
    def forward(ctx: Any, under_way: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        # Autograd would make a view of the tensor that it gave, and none of one that a checkpoint policy had kept.
        return internals.wait(under_way).view_as(under_way)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: _Exchange = ctx.exchange
        grad, _ = _apart(grads[0], exchange.columns)
        exchange.gradient = _start_all_to_all(grad, exchange.send, exchange.receive, exchange.group)
        return grads[0], None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup, columns: int | None, even: bool
    ) -> Tensor:
        ctx.sizes, ctx.group, ctx.columns = sizes, group, columns
        return _gather(x, sizes, group, even)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad, others = _apart(grads[0], ctx.columns)
        return _with_zeros(_reduce(grad, ctx.sizes, ctx.group), others), None, None, None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup, even: bool) -> Tensor:
        ctx.sizes, ctx.group, ctx.even = sizes, group, even
        return _reduce(x, sizes, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grads[0], ctx.sizes, ctx.group, ctx.even), None, None, None


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


def _gather(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, even: bool) -> Tensor:
    """Uneven, ``x`` goes to one rank after the other: one all-to-all would want it in its send buffer for each."""
    n, rank = group.size(), group.rank()
    if even and n > 2:
        _count(x, sizes, group)
        return internals.all_gather(x, group)
    x = x.contiguous()
    rows, parts = x.shape[0], [x] * n
    for step in range(1, n):
        to, of = (rank + step) % n, (rank - step) % n
        receive, send = ([size if i == peer else 0 for i in range(n)] for size, peer in ((sizes[of], of), (rows, to)))
        parts[of] = _start_all_to_all(x, receive, send, group)
    return torch.cat([part if i == rank else internals.wait(part) for i, part in enumerate(parts)])


def _reduce(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    n, mine = group.size(), sizes[group.rank()]
    parts = _all_to_all(x, [mine] * n, sizes, group)
    return parts.view(n, mine, *x.shape[1:]).sum(0)
