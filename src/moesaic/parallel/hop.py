"""One exchange of rows over a group: a token goes once to each member that has some of its experts.

An exchange over ranks is one hop. Over nodes it is two: to the nodes, and then to the ranks of each. Both are this:
what a hop brings, ids and weights among it, is what the next one sends.

Legend: T tokens (or rows that came by the hop before), K top-k, P members of the group, Q members that a token goes to
at most, S rows sent, M rows received, D model dim, n numbers that go with a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from moesaic.ops import Permutation, combine, permute, sort_by_expert
from moesaic.parallel.collectives import all_to_all, start_all_to_all
from moesaic.parallel.traffic import Split


class Addressed(NamedTuple):
    """Which member each row goes to.

    Attributes:
        rows: what row holds which slot; a token has Q of them, one for each member that it goes to.
        members_TQ: the member of each slot; P for a slot that is not used.
        owner_TK: the member that has each of a token's experts; P for none.
    """

    rows: Permutation
    members_TQ: Tensor
    owner_TK: Tensor


class Hop(NamedTuple):
    """One exchange that has begun, and the way back of what it brings."""

    rows: Permutation
    split: Split
    group: dist.ProcessGroup

    def back(self, z_MD: Tensor) -> Tensor:
        """The sum of what comes back for each token ``[T, D]``: its results on each member that it went to."""
        z_SD = all_to_all(z_MD, self.split.receive, self.split.send, self.group)
        return combine(z_SD, self.rows)


def owners(ids_TK: Tensor, experts: int, members: int) -> Tensor:
    """The member that has each expert, where each has ``experts`` of them; ``members`` for ids of padding, -1."""
    return torch.where(ids_TK < 0, members, ids_TK // experts)


def count(members: Tensor, num: int) -> Tensor:
    """How often each of ``num`` members is named; what is past the last counts for none."""
    flat = members.flatten()
    return flat.new_zeros(num + 1).scatter_add(0, flat, torch.ones_like(flat))[:num]


def distinct(owner_TK: Tensor, members: int) -> Tensor:
    """The members that each token goes to, each once, and ``members`` in place of repetitions."""
    sorted_TK = owner_TK.sort(dim=1).values
    is_again = pad(sorted_TK[:, 1:] == sorted_TK[:, :-1], (1, 0), value=False)
    return sorted_TK.masked_fill(is_again, members)


def members_of(owner_TK: Tensor, members: int) -> Tensor:
    """The slots of each token: the members that it goes to, and ``members`` in those that are left.

    A token goes to at most ``Q = min(K, P)`` members, so it has that many slots.
    """
    members_TQ = distinct(owner_TK, members)
    if members < members_TQ.shape[1]:
        members_TQ = members_TQ.sort(dim=1).values[:, :members]
    return members_TQ


def address(owner_TK: Tensor, members_TQ: Tensor, members: int, num_rows: int | None = None) -> Addressed:
    """Sort tokens by the members they go to, once a member however many of its experts they go to.

    ``num_rows`` is how many rows there are in all, where that is known; None makes one of each slot.
    """
    return Addressed(sort_by_expert(members_TQ, members, num_rows=num_rows), members_TQ, owner_TK)


def start_hop(
    x: Tensor,
    weights_TK: Tensor,
    numbers_Tn: Tensor,
    addressed: Addressed,
    split: Split,
    group: dist.ProcessGroup,
    experts: int,
) -> tuple[Hop, Callable[[], Tensor], Callable[[], Tensor]]:
    """Send rows, and in a second message weights and numbers.

    Args:
        x: tokens ``[T, D]``.
        weights_TK: weights of their copies.
        numbers_Tn: ids of experts first, in K columns, then others that go along as they are.
        addressed: where each goes.
        split: how many rows go to and come from each member.
        group: the members.
        experts: how many experts each member has; ids that arrive are numbers among the receiver's.

    Returns:
        The hop, and two functions that wait: for rows ``[M, D]``, and for messages that :func:`unpack` reads.
    """
    K, rows = weights_TK.shape[1], addressed.rows
    arriving = start_all_to_all(permute(x, rows), split.send, split.receive, group)
    weights_SK = permute(weights_TK, rows)
    numbers_Sn = _local_ids(numbers_Tn[:, :K], addressed, experts)
    if numbers_Tn.shape[1] > K:
        others_Sn = take_rows(numbers_Tn[:, K:], rows.slots // addressed.members_TQ.shape[1])
        numbers_Sn = torch.cat([numbers_Sn, others_Sn], 1)
    # The bits of a number stand where those of a weight would.
    as_weights = numbers_Sn.to(_integers(weights_SK)).view(weights_SK.dtype)
    message = torch.cat([weights_SK, as_weights], 1)
    return (
        Hop(rows, split, group),
        arriving,
        start_all_to_all(message, split.send, split.receive, group, columns=K),
    )


def unpack(message: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers. Only weights have a gradient."""
    numbers = message.detach()[:, K:].contiguous().view(_integers(message))
    return message.narrow(1, 0, K).contiguous(), numbers


def take_rows(t: Tensor, numbers: Tensor) -> Tensor:
    """Rows by their numbers, and zeros for a negative number. No size is asked for, which a compiler may not know."""
    return pad(t, (0, 0, 0, 1)).index_select(0, torch.where(numbers < 0, t.shape[0], numbers))


def _local_ids(ids_TK: Tensor, addressed: Addressed, experts: int) -> Tensor:
    """For every row sent, its token's experts by their number at the receiver; -1 for those elsewhere."""
    slots, members_TQ = addressed.rows.slots, addressed.members_TQ
    token_S, member_S1 = slots // members_TQ.shape[1], take_rows(members_TQ.reshape(-1, 1), slots)
    is_there = (take_rows(addressed.owner_TK, token_S) == member_S1) & (slots >= 0).unsqueeze(1)
    return torch.where(is_there, take_rows(ids_TK, token_S) - member_S1 * experts, -1)


def _integers(weights: Tensor) -> torch.dtype:
    return torch.int64 if weights.element_size() == 8 else torch.int32
