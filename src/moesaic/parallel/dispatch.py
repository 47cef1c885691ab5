"""Bring tokens to experts on other ranks and back.

Forward: all-to-all over ep, all-gather over etp, experts, reduce-scatter over etp, all-to-all back; backward the same
in reverse. Everything is uneven and only rows that exist are sent. A token that goes to several experts of one rank
travels there once, with its routing, and its results come back summed.

Where ep spans nodes, the all-to-all may be two: over nodes, between ranks of the same place in their nodes, and then
over the ranks of a node. A token that goes to several ranks of a node then crosses to it once, and the sum of its
results there crosses back once.

The experts are given the rows as they come, and a list of the copies that are here. So nothing is computed or kept of
those that are not, and no row is in memory once for each of its copies.

Legend: T this rank's tokens, K top-k, P ep ranks, L ep ranks of a node, D model dim, E experts, e experts a rank (the
last ranks may have fewer), M rows received over ep, N rows gathered over etp, of blocks of DTensors the most of any
rank, C copies of them that go to this rank's experts, rounded up, or the most of any rank.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from moesaic.layers.dispatch import Dispatched
from moesaic.layers.router import Routing
from moesaic.ops import Permutation
from moesaic.parallel.beside import Beside, streams_of
from moesaic.parallel.capacity import bounded_traffic, in_places, spoiled
from moesaic.parallel.collectives import all_gather_rows, reduce_scatter_rows
from moesaic.parallel.hop import Addressed, Hop, address, count, distinct, members_of, owners, start_hop, unpack
from moesaic.parallel.local import from_dtensor, to_dtensor
from moesaic.parallel.nodes import NodeGroups
from moesaic.parallel.placements import PLACES
from moesaic.parallel.traffic import Traffic, start_counts
from moesaic.sharding.internals import group_over_all_axes


class _Record(NamedTuple):
    hops: list[Hop]
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
        nodes: the groups of two hops, over nodes and then within each; None for one over all ep ranks. Not with a
            capacity.

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
        nodes: NodeGroups | None = None,
    ) -> None:
        self.mesh = mesh
        self.nodes = nodes
        self.local = local
        self.capacity = capacity
        self.most = torch.zeros((), dtype=torch.int64, device=mesh.device_type)
        self.ep = mesh.get_group("ep")
        self.etp = mesh.get_group("etp")
        self.all = group_over_all_axes(mesh, "ep_etp") if everyone is None else everyone

    def dispatch(
        self, x: Tensor, routing: Routing, num_experts: int, meanwhile: partial[Tensor] | None = None
    ) -> Dispatched:
        P, K = self.ep.size(), routing.ids.shape[1]
        experts_per_rank = -(-num_experts // P)
        beside = None if meanwhile is None else Beside(meanwhile, streams_of(x))
        addressed = self._address(routing.ids, experts_per_rank)
        if beside is not None:
            beside.queue()
        to, traffic, most = addressed()
        numbers_Tn = routing.ids
        if (keys_TK := routing.keys) is not None:
            # In halves, for a number has no more than 32 bits on its way.
            numbers_Tn = torch.cat([routing.ids, keys_TK >> 32, keys_TK << 32 >> 32], 1)
        (split, *further), members = traffic.splits, self._members()
        group, ranks = members[0]
        hop, rows, messages = start_hop(x, routing.weights, numbers_Tn, to, split, group, ranks * experts_per_rank)
        hops = [hop]
        if beside is not None:
            beside.call()
        for split, (group, ranks) in zip(further, members[1:], strict=True):
            weights_MK, numbers_Mn = unpack(messages(), K)
            experts = ranks * experts_per_rank
            owner_MK = owners(numbers_Mn[:, :K], experts, group.size())
            to = address(owner_MK, members_of(owner_MK, group.size()), group.size(), sum(split.send))
            hop, rows, messages = start_hop(rows(), weights_MK, numbers_Mn, to, split, group, experts)
            hops.append(hop)
        even = self.capacity is not None
        x_ND = all_gather_rows(rows(), traffic.gather, self.etp, even=even)
        message_N = all_gather_rows(messages(), traffic.gather, self.etp, columns=K, even=even)
        weights_NK, numbers_Nn = unpack(message_N, K)
        ids_NK, *halves_NK = numbers_Nn.split(K, dim=1)

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
            _Record(hops, traffic, most),
            None if beside is None else beside.result,
            # Numbers of copies lie as ids do.
            None if keys_NK is None else self._as_block(keys_NK, "ids"),
            self._as_block(copies_C, "copies"),
        )

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        record: _Record = dispatched.record
        z_1ND = z if self.local else from_dtensor(z, PLACES["z"], grad_placements=PLACES["grad"])
        z_ND = z_1ND[0] if self.local else z_1ND[0].narrow(0, 0, sum(record.traffic.gather))
        z_MD = reduce_scatter_rows(z_ND, record.traffic.gather, self.etp, even=self.capacity is not None)
        for hop in reversed(record.hops):
            z_MD = hop.back(z_MD)
        return z_MD if self.capacity is None else spoiled(z_MD, record.most, self.capacity)

    def _members(self) -> list[tuple[dist.ProcessGroup, int]]:
        """The group of each hop, and how many ep ranks each member of it stands for."""
        if self.nodes is None:
            return [(self.ep, 1)]
        return [(self.nodes.across, self.nodes.within.size()), (self.nodes.within, 1)]

    def _address(self, ids_TK: Tensor, experts_per_rank: int) -> Callable[[], tuple[Addressed, Traffic, Tensor]]:
        """Where tokens go in the first hop, how many rows go where in all, and the most copies for one rank.

        How many rows each rank has for each other is sent at once. The result is a function that waits.
        """
        P, (group, ranks) = self.ep.size(), self._members()[0]
        owner_TK = owners(ids_TK, experts_per_rank, P)
        copies_P = count(owner_TK, P)
        most = copies_P.max()
        self.most = torch.maximum(self.most, most)
        member_TK = owner_TK if ranks == 1 else owners(ids_TK, ranks * experts_per_rank, group.size())
        members_TQ = members_of(member_TK, group.size())
        traffic_of = self._traffic(owner_TK, copies_P, count(members_TQ, group.size()), ranks)

        def finish() -> tuple[Addressed, Traffic, Tensor]:
            # Sorted while counts are under way.
            to = address(member_TK, members_TQ, group.size())
            traffic = traffic_of()
            if self.capacity is not None:
                return to._replace(rows=in_places(to.rows, P, self.capacity)), traffic, most
            slots, positions, sizes = to.rows
            # Not slices: a compiler does not know that there are so many rows.
            slots_S = slots.narrow(0, 0, sum(traffic.splits[0].send))
            return to._replace(rows=Permutation(slots_S, positions, sizes)), traffic, most

        return finish

    def _traffic(self, owner_TK: Tensor, copies_P: Tensor, rows: Tensor, ranks: int) -> Callable[[], Traffic]:
        P = self.ep.size()
        if self.capacity is not None:
            return partial(bounded_traffic, self.capacity, P, self.etp.size())
        if ranks > 1:
            rows = torch.cat([rows, count(distinct(owner_TK, P), P)])
        return start_counts(rows, copies_P, self.ep, self.etp, self.all, ranks)

    def _as_block(self, t: Tensor, operand: str) -> Tensor:
        """This rank's block."""
        block = t.unsqueeze(0)
        if self.local:
            return block
        grads = PLACES.get(f"grad_{operand}")
        return to_dtensor(block, self.mesh, PLACES[operand], grad_placements=grads, blocks=self.ep.size())


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
