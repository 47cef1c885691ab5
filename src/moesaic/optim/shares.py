"""Who orthogonalises which matrix, and how its parts travel there and back.

Ranks that hold parts or copies of the same matrices share the work: each matrix has one owner among them. Parts go to
the owner in one all-to-all, results back in another, and both carry many parameters at once.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.optim.holders import Groups, Holders, holders_of
from moesaic.parallel.collectives import all_to_all
from moesaic.sharding.internals import Box

# How many elements a rank orthogonalises at once: 128 MiB in bf16, and a few times that for what is between.
AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Span:
    """Matrices of one parameter that have one owner.

    Attributes:
        parameter: its number.
        first, last: which of the matrices that this rank and the other holders share, from 0.
        rows, columns: of one matrix.
        boxes: rows and columns of the part on each holder.
        copies: to which copy of the matrices the part of each holder belongs.
    """

    parameter: int
    first: int
    last: int
    rows: int
    columns: int
    boxes: tuple[Box, ...]
    copies: tuple[int, ...]

    def part(self, holder: int) -> tuple[int, int, int]:
        """The shape of a holder's part."""
        rows, columns = self.boxes[holder]
        return self.last - self.first, rows.stop - rows.start, columns.stop - columns.start


@dataclass(frozen=True)
class Bucket:
    """Parameters whose parts travel together.

    Attributes:
        group: the ranks that share them; None if this rank has them alone.
        me: this rank's number among them.
        parameters: their numbers.
        spans: what each of these ranks owns.
    """

    group: dist.ProcessGroup | None
    me: int
    parameters: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]


def share_out(parameters: Sequence[Tensor], groups: Groups) -> list[Bucket]:
    """Give each matrix an owner among its holders, all of them about equal work. The same on all holders.

    Collective where several mesh axes are joined for the first time.
    """
    by_group: dict[str | None, list[tuple[int, Holders]]] = defaultdict(list)
    for number, parameter in enumerate(parameters):
        holders = holders_of(parameter, groups)
        by_group[None if holders.group is None else holders.group.group_name].append((number, holders))
    return [bucket for held in by_group.values() for bucket in _share_out(held, parameters)]


def _share_out(held: list[tuple[int, Holders]], parameters: Sequence[Tensor]) -> list[Bucket]:
    """The buckets of one group."""
    held = [(number, holders) for number, holders in held if holders.experts]
    if not held:
        return []

    def cost(number: int) -> int:
        small, large = sorted(parameters[number].shape[-2:])
        return small * small * large

    # The largest first, so that what comes last evens out the rest; and equal shapes beside each other.
    held.sort(key=lambda one: -cost(one[0]))
    group, me, count = held[0][1].group, held[0][1].me, len(held[0][1].boxes)
    loads = [0] * count
    buckets: list[Bucket] = []
    numbers: list[int] = []
    spans: list[list[Span]] = [[] for _ in range(count)]
    size = 0

    def close() -> None:
        nonlocal numbers, spans, size
        if numbers:
            buckets.append(Bucket(group, me, tuple(numbers), tuple(map(tuple, spans))))
        numbers, spans, size = [], [[] for _ in range(count)], 0

    for number, holders in held:
        rows, columns = parameters[number].shape[-2:]
        elements = holders.experts * rows * columns
        if size + elements > AT_ONCE * count:
            close()
        numbers.append(number)
        size += elements
        first = 0
        for owner, matrices in enumerate(_matrices_of_each(holders.experts, loads, cost(number))):
            if matrices:
                boxes = tuple(box[1:] for box in holders.boxes)
                spans[owner].append(Span(number, first, first + matrices, rows, columns, boxes, holders.copies))
            first += matrices
    close()
    return buckets


def _matrices_of_each(matrices: int, loads: list[int], cost: int) -> list[int]:
    """How many of equal matrices each rank gets, so that loads, which this adds to, stay near each other."""
    counts = [matrices // len(loads)] * len(loads)
    least_loaded = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    for rank in least_loaded[: matrices % len(loads)]:
        counts[rank] += 1
    for rank, count in enumerate(counts):
        loads[rank] += count * cost
    return counts


def through_owners(
    bucket: Bucket, inputs: dict[int, Tensor], work: Callable[[Tensor], Tensor]
) -> list[tuple[Span, Tensor]]:
    """Apply ``work`` to whole matrices, at their owners. Collective among the ranks of the bucket.

    Args:
        bucket: what is done at once.
        inputs: of each parameter of the bucket this rank's part, ``[e, m, n]``. All have one dtype and device.
        work: of ``[B, M, N]`` with ``M <= N``, a result of the same shape. Taller matrices come transposed.

    Returns:
        This rank's part of the result for each span.
    """
    me, count = bucket.me, len(bucket.spans)
    mine = bucket.spans[me]
    like = next(iter(inputs.values()))

    def sends(source: int, span: Span, owner: int) -> bool:
        # Of copies the owner takes the one that it is in.
        return span.copies[source] == span.copies[owner]

    if bucket.group is None:
        parts = [[inputs[span.parameter][span.first : span.last] for span in mine]]
    else:
        sent = [
            [inputs[s.parameter][s.first : s.last] for s in bucket.spans[owner] if sends(me, s, owner)]
            for owner in range(count)
        ]
        shapes = [[s.part(source) if sends(source, s, me) else (0, 0, 0) for s in mine] for source in range(count)]
        parts = _exchange(sent, shapes, like, bucket.group)
    results = _at_owner(mine, parts, like, work)
    if bucket.group is None:
        return list(zip(mine, results, strict=True))
    back = [[result[:, *s.boxes[r]] for s, result in zip(mine, results, strict=True)] for r in range(count)]
    shapes = [[s.part(me) for s in bucket.spans[owner]] for owner in range(count)]
    received = _exchange(back, shapes, like, bucket.group)
    return [
        pair for spans, parts in zip(bucket.spans, received, strict=True) for pair in zip(spans, parts, strict=True)
    ]


def _at_owner(
    spans: Sequence[Span], parts: list[list[Tensor]], like: Tensor, work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Put parts together, and work on all matrices of one shape at once."""
    of_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        of_shape[tuple(sorted((span.rows, span.columns)))].append(index)
    results: dict[int, Tensor] = {}
    for shape, indices in of_shape.items():
        batch = like.new_empty(sum(spans[i].last - spans[i].first for i in indices), *shape)
        sizes = [spans[i].last - spans[i].first for i in indices]
        for index, matrices in zip(indices, batch.split(sizes), strict=True):
            span = spans[index]
            whole = matrices.mT if span.rows > span.columns else matrices
            for holder, received in enumerate(parts):
                if received[index].numel():
                    whole[:, *span.boxes[holder]] = received[index]
        at_once = max(1, AT_ONCE // max(1, prod(shape)))
        done = torch.cat([work(piece) for piece in batch.split(at_once)]) if len(batch) > at_once else work(batch)
        for index, matrices in zip(indices, done.split(sizes), strict=True):
            span = spans[index]
            results[index] = matrices.mT if span.rows > span.columns else matrices
    return [results[index] for index in range(len(spans))]


def _exchange(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, int, int]]], like: Tensor, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Send tensors to each rank, and receive tensors of these shapes from each."""
    flat = [torch.cat([t.reshape(-1) for t in one]) if one else like.new_empty(0) for one in sent]
    sizes = [[prod(shape) for shape in one] for one in shapes]
    received = all_to_all(torch.cat(flat), [t.numel() for t in flat], [sum(one) for one in sizes], group)
    pieces = iter(received.split([size for one in sizes for size in one]))
    return [[next(pieces).view(shape) for shape in one] for one in shapes]
