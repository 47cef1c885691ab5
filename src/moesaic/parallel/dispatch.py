"""Bring tokens to experts on other ranks and back.

Forward: all-to-all over ep, all-gather over etp, experts, reduce-scatter over etp, all-to-all back; backward the same
in reverse. Everything is uneven and only rows that exist are sent. A token that goes to several experts of one rank
travels there once, with its routing, and its results come back summed.

Legend: T this rank's tokens, K top-k, P ep ranks, Q ranks that a token goes to at most, D model dim, E experts,
e experts a rank (the last ranks may have fewer), S rows sent, M rows received over ep, N rows gathered over etp, R
routed copies among them, C capacity of a block (the largest rank's R, rounded up).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from moesaic.layers.dispatch import Dispatched
from moesaic.layers.router import Routing
from moesaic.ops import Permutation, combine, permute, sort_by_expert
from moesaic.parallel.collectives import all_gather_rows, all_to_all, reduce_scatter_rows
from moesaic.parallel.local import from_dtensor, to_dtensor
from moesaic.parallel.placements import PLACES
from moesaic.parallel.traffic import Traffic, exchange_counts
from moesaic.sharding.internals import group_over_all_axes


class _Record(NamedTuple):
    sent: Permutation
    traffic: Traffic


class MeshDispatcher:
    """Dispatch over an (ep, etp) mesh. What it hands to the experts are DTensors in blocks, ``[Shard(0), Replicate]``.

    Args:
        mesh: with axes ``ep, etp``. Expert ``i`` lives on ep rank ``i // ceil(E / ep)``; the last ranks may have fewer
            experts, or none.
        local: hand over this rank's block alone, a plain tensor, and take the experts' results for it likewise.
        everyone: the group of all ranks of the mesh, in its order; None makes one, which is collective.
    """

    def __init__(self, mesh: DeviceMesh, *, local: bool, everyone: dist.ProcessGroup | None = None) -> None:
        self.mesh = mesh
        self.local = local
        self.ep = mesh.get_group("ep")
        self.etp = mesh.get_group("etp")
        self.all = group_over_all_axes(mesh, "ep_etp") if everyone is None else everyone

    def dispatch(self, x: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        experts_per_rank = -(-num_experts // self.ep.size())
        # Copies of padding, whose ids are -1, belong to a rank past the last.
        owner_TK = torch.where(routing.ids < 0, self.ep.size(), routing.ids // experts_per_rank)
        sent, ranks_TQ = _one_copy_a_rank(owner_TK, self.ep.size())
        traffic = exchange_counts(sent.group_sizes, self.ep, self.etp, self.all)

        # Not slices: a compiler does not know that there are so many rows.
        slots_S = sent.slots.narrow(0, 0, sum(traffic.send))
        sent = Permutation(slots_S, sent.positions, sent.group_sizes)
        local_ids_SK = _local_ids(routing.ids, owner_TK, sent, ranks_TQ, experts_per_rank)
        x_ND, weights_NK = (self._to_experts(permute(t, sent), traffic) for t in (x, routing.weights))
        ids_NK = self._to_experts(local_ids_SK.to(torch.int32), traffic).to(local_ids_SK.dtype)

        return Dispatched(
            self._in_blocks(x_ND, traffic.capacity, "x"),
            self._in_blocks(ids_NK, traffic.capacity, "ids", padding=-1),
            self._in_blocks(weights_NK, traffic.capacity, "weights"),
            _Record(sent, traffic),
        )

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        record: _Record = dispatched.record
        z_1CD = z if self.local else from_dtensor(z, PLACES["z"], grad_placements=PLACES["grad"])
        z_ND = z_1CD[0].narrow(0, 0, sum(record.traffic.gather))
        z_MD = reduce_scatter_rows(z_ND, record.traffic.gather, self.etp)
        z_SD = all_to_all(z_MD, record.traffic.receive, record.traffic.send, self.ep)
        return combine(z_SD, record.sent)

    def _in_blocks(self, t_N: Tensor, capacity: int, operand: str, *, padding: int = 0) -> Tensor:
        """This rank's block, filled up to the capacity of all."""
        t_1C = pad(t_N, (0, 0, 0, capacity - t_N.shape[0]), value=padding).unsqueeze(0)
        if self.local:
            return t_1C
        grads = PLACES.get(f"grad_{operand}")
        return to_dtensor(t_1C, self.mesh, PLACES[operand], grad_placements=grads, blocks=self.ep.size())

    def _to_experts(self, t: Tensor, traffic: Traffic) -> Tensor:
        t = all_to_all(t, traffic.send, traffic.receive, self.ep)
        return all_gather_rows(t, traffic.gather, self.etp)


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
    token_S, rank_S1 = sent.slots // ranks_TQ.shape[1], ranks_TQ.flatten()[sent.slots].unsqueeze(1)
    return torch.where(owner_TK[token_S] == rank_S1, ids_TK[token_S] - rank_S1 * experts_per_rank, -1)
