"""Lay a MoE layer's experts over the (ep, etp) mesh, and connect it to the other ranks.

Two ways, the same numbers (pytorch/torchtitan issue 434): ``"dtensor"`` runs the layer's own code on DTensors through
the operators' sharding rules, ``"local"`` runs it on their local tensors inside ``local_map``.
"""

from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.experimental import local_map

from moesaic.layers import GroupedExperts, MoE
from moesaic.layers.experts import MainGrads
from moesaic.parallel.dispatch import MeshDispatcher
from moesaic.parallel.down_bias import add_down_bias_apart, on_first_rank
from moesaic.parallel.fit import expert_misfit
from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.placements import PLACES

# As the experts' compute takes them.
_WEIGHTS = ("w1", "w3", "w2", "b1", "b3", "b2")

ComputeOn = Literal["dtensor", "local"]


def check_experts(name: str, moe: MoE, layout: MeshLayout) -> None:
    """Raise ``ValueError`` unless the experts of a layer can be laid over ``edp`` x ``ep`` x ``etp`` ranks."""
    if not isinstance(moe.experts, GroupedExperts):
        raise ValueError(
            f"model: the experts of '{name}' are {type(moe.experts).__name__} and not GroupedExperts; if adapters wrap "
            "them, merge those first (of peft: merge_and_unload())"
        )
    if misfit := expert_misfit(moe.config.num_experts, moe.config.hidden_dim, moe.config.dim, layout):
        raise ValueError(f"{misfit.axis}: {misfit.problem}; for '{name}' choose one of {misfit.legal}")
    if moe.config.expert_biases and layout.edp > 1 and moe.config.num_experts % layout.ep:
        raise ValueError(
            f"ep: {layout.ep} does not divide the {moe.config.num_experts} experts of '{name}', whose biases FSDP over "
            f"edp {layout.edp} could then not cut; choose ep to divide them, or edp 1"
        )


def distribute_experts(moe: MoE, mesh: DeviceMesh, all_ranks: dist.ProcessGroup, compute: ComputeOn) -> None:
    """Make the expert weights DTensors on ``mesh``, dispatch tokens over it, and count loads over all ranks."""
    for name, weight in list(moe.experts.named_parameters()):
        # Cloned, for a shard would otherwise keep the storage of the whole weight alive.
        shard = distribute_tensor(weight.detach(), mesh, PLACES[name], src_data_rank=None).clone()
        setattr(moe.experts, name, nn.Parameter(shard, requires_grad=weight.requires_grad))
    moe.dispatcher = MeshDispatcher(mesh)
    moe.router.reduce_counts = partial(_sum_over, group=all_ranks)
    if compute == "local":
        _compute_on_local_tensors(moe.experts, mesh)
    elif moe.config.expert_biases:
        add_down_bias_apart(moe.experts, mesh)


def _compute_on_local_tensors(experts: GroupedExperts, mesh: DeviceMesh) -> None:
    compute: Any = experts.compute

    def on_local(*operands: Any, main_grads: MainGrads | None = None) -> Tensor:
        *others, b2 = operands
        return compute(*others, None if b2 is None else on_first_rank(b2, mesh), main_grads=main_grads)

    given = ["x", "ids", "weights", *(n if getattr(experts, n) is not None else None for n in _WEIGHTS)]
    places = [None if name is None else PLACES[name] for name in given]
    function: Any = local_map(
        on_local,
        out_placements=(PLACES["z"],),
        in_placements=tuple(places),
        in_grad_placements=tuple(PLACES.get(f"grad_{n}", p) for n, p in zip(given, places, strict=True)),
        device_mesh=mesh,
    )
    experts.compute = function


def _sum_over(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = counts.clone()
    dist.all_reduce(total, group=group)
    return total
