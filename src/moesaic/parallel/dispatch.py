"""Bring tokens to experts on other ranks and back.

Forward: all-to-all over ep, all-gather over etp, experts, reduce-scatter over etp, all-to-all back; backward the same
in reverse. Everything is uneven and only rows that exist are sent. A token that goes to several experts of one rank
travels there once, with its routing, and its results come back summed.

The experts are given the rows as they come, and a list of the copies that are here. So nothing is computed or kept of
those that are not, and no row is in memory once for each of its copies.

Legend: T this rank's tokens, K top-k, P ep ranks, Q ranks that a token goes to at most, D model dim, E experts,
e experts a rank (the last ranks may have fewer), S rows sent, M rows received over ep, N rows gathered over etp, of
blocks of DTensors the most of any rank, C copies of them that go to this rank's experts, rounded up, or the most of any
rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from moesaic.layers.dispatch import Dispatched
from moesaic.layers.router import Routing
from moesaic.ops import Permutation, combine, permute, sort_by_expert
from moesaic.parallel.capacity import bounded_traffic, in_places, spoiled
from moesaic.parallel.collectives import all_gather_rows, all_to_all, reduce_scatter_rows, start_all_to_all
from moesaic.parallel.local import from_dtensor, to_dtensor
from moesaic.parallel.placements import PLACES
from moesaic.parallel.traffic import Traffic, exchange_counts
from moesaic.sharding.internals import group_over_all_axes


class _Record(NamedTuple):
    sent: Permutation
    traffic: Traffic
    most: Tensor


class MeshDispatcher:
    """Dispatch over an (ep, etp) mesh. What it hands to the experts are DTensors in blocks, ``[Shard(0), Replicate]``.

    A row is a token that some rank sent, with K ids: those of this rank's experts, and -1 for those elsewhere. Rows of
    no expert fill a block up.

    Args:
        mesh: with axes ``ep, etp``. Expert ``i`` lives on ep rank ``i // ceil(E / ep)``; the last ranks may have fewer
            experts, or none.
        local: hand over this rank's block alone, a plain tensor, and take the experts' results for it likewise. It is
            as long as this rank needs it; as a DTensor, as the rank with most rows does.
        everyone: the group of all ranks of the mesh, in its order; None makes one, which is collective.
        capacity: room for so many copies from each rank to each other, whatever the routing is: nothing is counted, and
            the tokens of a rank that has more come back as NaN. None for what the routing needs.

    Attributes:
        most: on the device, the most copies that this rank has routed to one rank's experts.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        local: bool,
        everyone: dist.ProcessGroup | None = None,
        capacity: int | None = None,
    ) -> None:
        self.mesh = mesh
        self.local = local
        self.capacity = capacity
        self.most = torch.zeros((), dtype=torch.int64, device=mesh.device_type)
        self.ep = mesh.get_group("ep")
        self.etp = mesh.get_group("etp")
        self.all = group_over_all_axes(mesh, "ep_etp") if everyone is None else everyone

    def dispatch(
        self, x: Tensor, routing: Routing, num_experts: int, meanwhile: Callable[[], Tensor] | None = None
    ) -> Dispatched:
        P = self.ep.size()
        experts_per_rank = -(-num_experts // P)
        # Copies of padding, whose ids are -1, belong to a rank past the last.
        owner_TK = torch.where(routing.ids < 0, P, routing.ids // experts_per_rank)
        sent, ranks_TQ = _one_copy_a_rank(owner_TK, P)
        ones = torch.ones_like(owner_TK).flatten()
        copies_P = ones.new_zeros(P + 1).scatter_add(0, owner_TK.flatten(), ones)[:P]
        most = copies_P.max()
        self.most = torch.maximum(self.most, most)
        if self.capacity is None:
            traffic = exchange_counts(sent.group_sizes, copies_P, self.ep, self.etp, self.all)
            # Not slices: a compiler does not know that there are so many rows.
            slots_S = sent.slots.narrow(0, 0, sum(traffic.send))
            sent = Permutation(slots_S, sent.positions, sent.group_sizes)
        else:
            traffic = bounded_traffic(self.capacity, P, self.etp.size())
            sent = in_places(sent, P, self.capacity)
        ids_SK = _local_ids(routing.ids, owner_TK, sent, ranks_TQ, experts_per_rank)
        rows = start_all_to_all(permute(x, sent), traffic.send, traffic.receive, self.ep)
        numbers_S = ids_SK
        if routing.keys is not None:
            keys_SK = _rows(routing.keys, sent.slots // ranks_TQ.shape[1])
            # In halves, for a number has no more than 32 bits on its way.
            numbers_S = torch.cat([ids_SK, keys_SK >> 32, keys_SK << 32 >> 32], 1)
        routings = self._start_routing(permute(routing.weights, sent), numbers_S, traffic)
        beside = None if meanwhile is None else meanwhile()
        x_ND = all_gather_rows(rows(), traffic.gather, self.etp)
        weights_NK, numbers_N = routings()
        ids_NK, *halves_NK = numbers_N.split(weights_NK.shape[1], dim=1)

        # In memory of their own, for what is kept of them would keep the whole message.
        ids_NK, keys_NK = ids_NK.contiguous(), _keys(*halves_NK) if halves_NK else None
        copies_C = _copies_here(ids_NK, traffic.copies if self.local else traffic.most_copies)
        if not self.local:
            # Below the rows of this rank, those of no expert.
            end = (0, 0, 0, traffic.most_rows - sum(traffic.gather))
            x_ND, weights_NK, ids_NK = pad(x_ND, end), pad(weights_NK, end), pad(ids_NK, end, value=-1)
            keys_NK = None if keys_NK is None else pad(keys_NK, end)
        return Dispatched(
            self._as_block(x_ND, "x"),
            self._as_block(ids_NK, "ids"),
            self._as_block(weights_NK, "weights"),
            _Record(sent, traffic, most),
            beside,
            # Numbers of copies lie as ids do.
            None if keys_NK is None else self._as_block(keys_NK, "ids"),
            self._as_block(copies_C, "copies"),
        )

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        record: _Record = dispatched.record
        z_1ND = z if self.local else from_dtensor(z, PLACES["z"], grad_placements=PLACES["grad"])
        z_ND = z_1ND[0] if self.local else z_1ND[0].narrow(0, 0, sum(record.traffic.gather))
        z_MD = reduce_scatter_rows(z_ND, record.traffic.gather, self.etp)
        z_SD = all_to_all(z_MD, record.traffic.receive, record.traffic.send, self.ep)
        z_TD = combine(z_SD, record.sent)
        return z_TD if self.capacity is None else spoiled(z_TD, record.most, self.capacity)

    def _as_block(self, t: Tensor, operand: str) -> Tensor:
        """This rank's block."""
        block = t.unsqueeze(0)
        if self.local:
            return block
        grads = PLACES.get(f"grad_{operand}")
        return to_dtensor(block, self.mesh, PLACES[operand], grad_placements=grads, blocks=self.ep.size())

    def _start_routing(
        self, weights_SK: Tensor, numbers_S: Tensor, traffic: Traffic
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Weights and numbers in one message, in which the bits of a number stand where those of a weight would."""
        K, integers = weights_SK.shape[1], torch.int64 if weights_SK.element_size() == 8 else torch.int32
        as_weights = numbers_S.to(integers).view(weights_SK.dtype)
        message = torch.cat([weights_SK, as_weights], 1)
        arrived = start_all_to_all(message, traffic.send, traffic.receive, self.ep, columns=K)

        def finish() -> tuple[Tensor, Tensor]:
            message = all_gather_rows(arrived(), traffic.gather, self.etp, columns=K)
            numbers_N = message.detach().narrow(1, K, as_weights.shape[1]).contiguous().view(integers)
            return message.narrow(1, 0, K).contiguous(), numbers_N

        return finish


def _one_copy_a_rank(owner_TK: Tensor, num_ranks: int) -> tuple[Permutation, Tensor]:
    """Sort tokens by the ranks they go to, once a rank however many of its experts they go to.

    A token goes to at most ``Q = min(K, P)`` ranks, so it has that many slots.

    Returns:
        The permutation, and the rank of each slot ``[T, Q]``; P for a slot that is not used.
    """
    ranks_TK = owner_TK.sort(dim=1).values
    is_again = pad(ranks_TK[:, 1:] == ranks_TK[:, :-1], (1, 0), value=False)
    ranks_TQ = ranks_TK.masked_fill(is_again, num_ranks)
    if num_ranks < ranks_TQ.shape[1]:
        ranks_TQ = ranks_TQ.sort(dim=1).values[:, :num_ranks]
    return sort_by_expert(ranks_TQ, num_ranks), ranks_TQ


def _local_ids(ids_TK: Tensor, owner_TK: Tensor, sent: Permutation, ranks_TQ: Tensor, experts_per_rank: int) -> Tensor:
    """For every row sent, its token's experts by their number on the receiving rank; -1 for those elsewhere."""
    token_S, rank_S1 = sent.slots // ranks_TQ.shape[1], _rows(ranks_TQ.reshape(-1, 1), sent.slots)
    is_there = (_rows(owner_TK, token_S) == rank_S1) & (sent.slots >= 0).unsqueeze(1)
    return torch.where(is_there, _rows(ids_TK, token_S) - rank_S1 * experts_per_rank, -1)


def _copies_here(ids_NK: Tensor, num_copies: int) -> Tensor:
    """The numbers ``n * K + k`` of the copies that are here, in order, and -1 to fill the list up."""
    is_here = ids_NK.flatten() >= 0
    place = is_here.cumsum(0) - 1
    # What has no place is written past the end. Of those that are here, only a bound that was exceeded leaves some so.
    place = torch.where(is_here & (place < num_copies), place, num_copies)
    numbers = torch.arange(ids_NK.numel(), device=ids_NK.device)
    return numbers.new_full((num_copies + 1,), -1).scatter(0, place, numbers).narrow(0, 0, num_copies)


def _keys(high: Tensor, low: Tensor) -> Tensor:
    return high.to(torch.int64) << 32 | (low.to(torch.int64) & 0xFFFFFFFF)


def _rows(t: Tensor, numbers: Tensor) -> Tensor:
    """Rows by their numbers, and zeros for a negative number. No size is asked for, which a compiler may not know."""
    return pad(t, (0, 0, 0, 1)).index_select(0, torch.where(numbers < 0, t.shape[0], numbers))
