"""How many rows go where in an exchange over an (ep, etp) mesh.

Legend: P ep ranks, Q etp ranks; in two hops N nodes of L ep ranks each, P = N * L.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.beside import streams_of
from moesaic.parallel.collectives import start_all_gather


class Split(NamedTuple):
    """How many rows go to each member of a group, and come from each."""

    send: list[int]
    receive: list[int]


class Traffic(NamedTuple):
    """How many rows go where, known to every rank of the (ep, etp) mesh alike.

    Attributes:
        splits: one for each hop: over all ep ranks; or over nodes, and then over the ranks of a node.
        gather: rows that each etp rank brings to the all-gather, N in all.
        copies: C, how many copies of tokens go to this rank's experts, rounded up.
        most_copies: the most of any rank.
        most_rows: the most rows that any rank gathers, rounded up.
    """

    splits: tuple[Split, ...]
    gather: list[int]
    copies: int
    most_copies: int
    most_rows: int


def start_counts(
    rows: Tensor,
    copies_P: Tensor,
    ep: dist.ProcessGroup,
    etp: dist.ProcessGroup,
    everyone: dist.ProcessGroup,
    per_node: int = 1,
) -> Callable[[], Traffic]:
    """One small all-gather and one copy to the host, for all sizes of a layer's exchange, however many hops it has.

    The result is a function that waits for them. On CUDA what is queued before it is called does not delay them.

    Args:
        rows: how many rows this rank has for each ep rank ``[P]``; in two hops for each node, and then for each ep
            rank, ``[N + P]``.
        copies_P: to how many experts of each ep rank they go, a row perhaps to several.
        ep, etp, everyone: the groups of both axes, and of the two together.
        per_node: L, how many ep ranks in a row make a node; 1 for one hop.
    """
    streams = streams_of(rows)
    counts = start_all_gather(torch.cat([rows, copies_P]), everyone)

    def finish() -> Traffic:
        with contextlib.nullcontext() if streams is None else streams.on(streams.copies):
            return _read_counts(counts(), ep, etp, per_node)

    return finish


@torch.no_grad()
def _read_counts(counts: Tensor, ep: dist.ProcessGroup, etp: dist.ProcessGroup, per_node: int) -> Traffic:
    P, Q = ep.size(), etp.size()
    sizes = torch.ops.moesaic.traffic(counts, P, Q, ep.rank(), etp.rank(), per_node).tolist()
    if torch.compiler.is_compiling():  # there they are symbols, of which nothing is known
        for size in sizes[:-3]:
            torch._check(size >= 0)
        for size in sizes[-3:]:
            torch._check(size >= 2)
    members = (P,) if per_node == 1 else (P // per_node, per_node)
    splits, start = [], 0
    for num in members:
        send, receive = sizes[start : start + num], sizes[start + num : start + 2 * num]
        start += 2 * num
        # A compiler does not know which numbers are equal.
        splits.append(Split(send, send if num == 1 else receive))
    gather = sizes[start:-3]
    # Nor does it here: this rank brings to the all-gather what it received.
    gather[etp.rank()] = sum(splits[-1].receive)
    return Traffic(tuple(splits), gather, *sizes[-3:])


# An operator, so that a compiler need not know how a capacity is rounded. No sharding rule: counts are a rank's own.
torch.library.define(
    "moesaic::traffic", "(Tensor counts, int ep, int etp, int ep_rank, int etp_rank, int per_node=1) -> Tensor"
)


@torch.library.impl("moesaic::traffic", "default")
def _traffic(counts: Tensor, ep: int, etp: int, ep_rank: int, etp_rank: int, per_node: int = 1) -> Tensor:
    # [ep source, etp source, destination]
    counts_PQ = counts.view(ep, etp, -1).cpu()
    rows_PQP, copies_PQP = counts_PQ[..., -2 * ep : -ep], counts_PQ[..., -ep:]
    copies_P, gathered_P = copies_PQP.sum((0, 1)).tolist(), rows_PQP.sum((0, 1)).tolist()
    rounded = map(round_up_capacity, (copies_P[ep_rank], max(copies_P), max(gathered_P)))
    if per_node == 1:
        sizes = [rows_PQP[ep_rank, etp_rank], rows_PQP[:, etp_rank, ep_rank]]
    else:
        node, place = divmod(ep_rank, per_node)
        nodes = slice(node * per_node, (node + 1) * per_node)
        # What is sent on came from ranks with this place in their nodes: [node, place, destination].
        passed_NLP = rows_PQP[:, etp_rank].unflatten(0, (-1, per_node))
        sizes = [
            counts_PQ[ep_rank, etp_rank, : -2 * ep],
            counts_PQ[place::per_node, etp_rank, node],
            passed_NLP[:, place, nodes].sum(0),
            passed_NLP[:, :, ep_rank].sum(0),
        ]
    return torch.cat([*sizes, rows_PQP[:, :, ep_rank].sum(0), rows_PQP.new_tensor([*rounded])])


@torch.library.register_fake("moesaic::traffic")
def _traffic_fake(counts: Tensor, ep: int, etp: int, ep_rank: int, etp_rank: int, per_node: int = 1) -> Tensor:
    hops = ep if per_node == 1 else ep // per_node + per_node
    return counts.new_empty(2 * hops + etp + 3, device="cpu")


def round_up_capacity(rows: int) -> int:
    """Round up to one of sixteen sizes an octave, so that shapes, and the caches keyed by them, repeat.

    At most a sixteenth more, and that of copies which go to no expert, so nothing is computed for them. At least two:
    DTensor refuses to view a sharded dim of size zero, and a compiler takes a dim of size one for another case.

    Example:
        >>> [round_up_capacity(n) for n in (0, 5, 17, 1000)]
        [2, 5, 17, 1024]
    """
    rows = max(rows, 2)
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step
