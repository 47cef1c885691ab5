"""Our exchange of tokens and our experts under transformers' own expert parallelism: ``ep_implementation="moesaic"``.

transformers lays out the weights, cuts attention, applies FSDP2 and loads the files. Only what lies between a router
and the residual is ours. A token goes once to each rank that has some of its experts, and its results come back summed.
transformers' ``"all_to_all"`` sends a copy for each expert, there and back.

Legend: T tokens, D model dim, K top-k, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from moesaic.integrations.transformers.experts import check_follows_interface, experts_forward
from moesaic.layers.router import Routing
from moesaic.parallel.build import experts_over
from moesaic.parallel.dispatch import MeshDispatcher


class MoesaicEP:
    """The experts of one module on the ranks of an expert group. transformers makes it when it lays out a model.

    Experts are computed by our operators, whatever ``experts_implementation`` says. Where all ranks of the group have
    the same tokens (``ep_size == tp_size``), nothing is sent to the experts: each rank computes with those that it has,
    and the results are summed over ranks. Otherwise each rank of a tp group sends its part of the tokens they share.

    Args:
        experts: the module, with this rank's experts alone: number ``ep_rank * num_experts`` and those that follow.
        ep_mesh: the ranks that have all experts together.
        tp_mesh: the ranks that have the same tokens.

    Raises:
        TypeError: the module does not follow transformers' experts interface.
    """

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        check_follows_interface(experts, 'ep_implementation="all_to_all"')
        self.experts = experts
        self.ep_mesh, self.tp_mesh = ep_mesh, tp_mesh
        self.num_local = experts.num_experts
        group = ep_mesh.get_group()
        self.first = self.num_local * dist.get_group_rank(group, dist.get_rank())
        self.shares_tokens = _members(group) == _members(tp_mesh.get_group())
        self.dispatcher = None if self.shares_tokens else _dispatcher(ep_mesh)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``z[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t])``. Ids outside of ``0..E-1`` add nothing.

        Args:
            hidden_states: ``[T, D]``, this rank's tokens.
            top_k_index: ``[T, K]``, numbers among all experts.
            top_k_weights: ``[T, K]``.

        Returns:
            ``[T, D]``.
        """
        if self.dispatcher is None:
            return self._on_shared_tokens(hidden_states, top_k_index, top_k_weights)
        shared = self.tp_mesh.size() > 1
        x_TD, ids_TK, weights_TK = hidden_states, top_k_index, top_k_weights
        if shared:
            x_TD, ids_TK, weights_TK = (self._own_part(t) for t in (x_TD, ids_TK, weights_TK))
        num_experts = self.num_local * self.ep_mesh.size()
        ids_TK = ids_TK.masked_fill(ids_TK >= num_experts, -1)
        sent = self.dispatcher.dispatch(x_TD, Routing(ids_TK, weights_TK), num_experts)
        assert sent.copies is not None
        z_ND = experts_forward(self.experts, sent.x[0], sent.topk_ids[0], sent.topk_weights[0], sent.copies[0])
        z_TD = self.dispatcher.combine(z_ND.unsqueeze(0), sent)
        return self._whole(z_TD, hidden_states) if shared else z_TD

    def _on_shared_tokens(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ids_TK = ids_TK - self.first
        ids_TK = ids_TK.masked_fill((ids_TK < 0) | (ids_TK >= self.num_local), -1)
        # Each rank's gradients are those of its experts alone, and so parts of a sum.
        x_TD, weights_TK = (
            DTensor.from_local(t, self.ep_mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
            for t in (x_TD, weights_TK)
        )
        z_TD = experts_forward(self.experts, x_TD, ids_TK, weights_TK)
        summed = DTensor.from_local(z_TD, self.ep_mesh, [Partial()], run_check=False).redistribute(
            placements=[Replicate()]
        )
        return summed.to_local(grad_placements=[Replicate()])

    def _own_part(self, t: Tensor) -> Tensor:
        """This rank's part of tokens that the ranks of a tp group share. Nothing is sent; gradients are gathered."""
        whole = DTensor.from_local(t, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(0)]).to_local(grad_placements=[Shard(0)])

    def _whole(self, part_TD: Tensor, like_TD: Tensor) -> Tensor:
        parts = DTensor.from_local(
            part_TD.contiguous(),
            self.tp_mesh,
            [Shard(0)],
            run_check=False,
            shape=like_TD.shape,
            stride=(like_TD.shape[1], 1),
        )
        return parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])


def _members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


# One for all layers, as long as torch keeps the group.
_dispatchers: torch.utils.weak.WeakIdKeyDictionary = torch.utils.weak.WeakIdKeyDictionary()


def _dispatcher(ep_mesh: DeviceMesh) -> MeshDispatcher:
    group = ep_mesh.get_group()
    if group not in _dispatchers:
        mesh = experts_over(group, ep_mesh.device_type)
        _dispatchers[group] = MeshDispatcher(mesh, local=True, everyone=group)
    return _dispatchers[group]
