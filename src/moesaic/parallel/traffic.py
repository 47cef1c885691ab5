"""How many rows go where in an exchange over an (ep, etp) mesh.

Legend: P ep ranks, Q etp ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.collectives import all_gather


class Traffic(NamedTuple):
    """How many rows go where, known to every rank of the (ep, etp) mesh alike.

    Attributes:
        send, receive: rows to and from each ep rank.
        gather: rows that each etp rank brings to the all-gather, N in all.
        copies: C, how many copies of tokens go to this rank's experts, rounded up.
        most_copies: the most of any rank.
        most_rows: the most rows that any rank gathers, rounded up.
    """

    send: list[int]
    receive: list[int]
    gather: list[int]
    copies: int
    most_copies: int
    most_rows: int


@torch.no_grad()
def exchange_counts(
    rows_P: Tensor, copies_P: Tensor, ep: dist.ProcessGroup, etp: dist.ProcessGroup, everyone: dist.ProcessGroup
) -> Traffic:
    """One small all-gather and one copy to the host, for all sizes of a layer's exchange.

    Args:
        rows_P: how many rows this rank has for each ep rank.
        copies_P: to how many experts of each ep rank they go, a row perhaps to several.
        ep, etp, everyone: the groups of both axes, and of the two together.
    """
    P, Q = ep.size(), etp.size()
    counts = all_gather(torch.stack([rows_P, copies_P]), everyone)
    sizes = torch.ops.moesaic.traffic(counts, P, Q, ep.rank(), etp.rank()).tolist()
    if torch.compiler.is_compiling():  # there they are symbols, of which nothing is known
        for size in sizes[:-3]:
            torch._check(size >= 0)
        for size in sizes[-3:]:
            torch._check(size >= 2)
    send, receive, gather = sizes[:P], sizes[P : 2 * P], sizes[2 * P : -3]
    # A compiler does not know which numbers are equal: this rank brings to the all-gather what it received.
    receive = send if P == 1 else receive
    gather[etp.rank()] = sum(receive)
    return Traffic(send, receive, gather, *sizes[-3:])


# An operator, so that a compiler need not know how a capacity is rounded. No sharding rule: counts are a rank's own.
torch.library.define("moesaic::traffic", "(Tensor counts, int ep, int etp, int ep_rank, int etp_rank) -> Tensor")


@torch.library.impl("moesaic::traffic", "default")
def _traffic(counts: Tensor, ep: int, etp: int, ep_rank: int, etp_rank: int) -> Tensor:
    # [ep source, etp source, ep destination]
    rows_PQP, copies_PQP = counts.view(ep, etp, 2, ep).cpu().unbind(2)
    copies_P, gathered_P = copies_PQP.sum((0, 1)).tolist(), rows_PQP.sum((0, 1)).tolist()
    rounded = map(round_up_capacity, (copies_P[ep_rank], max(copies_P), max(gathered_P)))
    return torch.cat(
        [
            rows_PQP[ep_rank, etp_rank],
            rows_PQP[:, etp_rank, ep_rank],
            rows_PQP[:, :, ep_rank].sum(0),
            rows_PQP.new_tensor([*rounded]),
        ]
    )


@torch.library.register_fake("moesaic::traffic")
def _traffic_fake(counts: Tensor, ep: int, etp: int, ep_rank: int, etp_rank: int) -> Tensor:
    return counts.new_empty(2 * ep + etp + 3, device="cpu")


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
