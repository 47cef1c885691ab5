"""Lay a MoE layer's experts over the (ep, etp) mesh, and connect it to the other ranks.

Two ways, the same numbers (pytorch/torchtitan issue 434): ``"dtensor"`` runs the layer's own code on DTensors through
the operators' sharding rules, ``"local"`` runs it on their local tensors.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor

from moesaic.layers import GroupedExperts, MoE
from moesaic.layers.dropout import Holders
from moesaic.layers.lora import ExpertsAdapter
from moesaic.parallel.collectives import sum_over_ranks
from moesaic.parallel.dispatch import MeshDispatcher
from moesaic.parallel.fit import expert_misfit
from moesaic.parallel.local import counted_once, from_dtensor, unshadow_parameters
from moesaic.parallel.mesh import Meshes, MeshLayout
from moesaic.parallel.packed import check_packed, distribute_packed, local_weights, packed_weights
from moesaic.parallel.placements import COLUMNS, FACTORS, GRADIENTS, TERMS, WEIGHTS

ComputeOn = Literal["dtensor", "local"]


def check_experts(name: str, moe: MoE, layout: MeshLayout, compute: ComputeOn) -> None:
    """Raise ``ValueError`` unless the experts of a layer can be laid over ``edp`` x ``ep`` x ``etp`` ranks."""
    if not isinstance(moe.experts, GroupedExperts):
        raise ValueError(
            f"model: the experts of '{name}' are {type(moe.experts).__name__} and not GroupedExperts; if adapters of "
            "peft wrap them, merge those first (merge_and_unload()), or add adapters by "
            "moesaic.integrations.peft.add_adapters"
        )
    if misfit := expert_misfit(moe.config.num_experts, moe.config.hidden_dim, moe.config.dim, layout):
        raise ValueError(f"{misfit.axis}: {misfit.problem}; for '{name}' choose one of {misfit.legal}")
    if moe.config.expert_biases and layout.edp > 1 and moe.config.num_experts % layout.ep:
        raise ValueError(
            f"ep: {layout.ep} does not divide the {moe.config.num_experts} experts of '{name}', whose biases FSDP over "
            f"edp {layout.edp} could then not cut; choose ep to divide them, or edp 1"
        )
    check_packed(name, moe.experts, layout, compute == "local")
    if layout.edp > 1 and moe.config.num_experts % layout.ep:
        adapters = [m for m in moe.experts.modules() if isinstance(m, ExpertsAdapter)]
        for adapter in adapters:
            odd = sorted({rank.r for rank in adapter.ranks.values() if rank.r % layout.edp})
            if odd:
                raise ValueError(
                    f"ep: {layout.ep} does not divide the {moe.config.num_experts} experts of '{name}', so FSDP over "
                    f"edp {layout.edp} cuts the ranks of its adapters, which it cannot for {odd}; choose ep to divide "
                    f"the experts, edp 1, or ranks that {layout.edp} divides"
                )


def distribute_experts(moe: MoE, meshes: Meshes, holders: Holders, compute: ComputeOn, capacity: int | None) -> None:
    """Make the expert weights DTensors on (ep, etp), dispatch tokens over it, and count loads over all ranks.

    ``holders`` are the ranks that hold the tokens. ``capacity`` bounds what is exchanged.
    """
    mesh = meshes.expert["ep", "etp"]
    places = WEIGHTS | FACTORS
    for owner in moe.experts.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            # Cloned, for a shard would otherwise keep the storage of the whole weight alive.
            shard = distribute_tensor(weight.detach(), mesh, places[name], src_data_rank=None).clone()
            setattr(owner, name, nn.Parameter(shard, requires_grad=weight.requires_grad))
    distribute_packed(moe.experts, mesh)
    if mesh.size() == 1:
        # All experts are here: nothing is counted, sorted or sent, and local tensors have the same numbers as DTensors.
        compute = "local"
    else:
        nodes = meshes.nodes.exchange(moe.config, capacity).nodes
        moe.dispatcher = MeshDispatcher(mesh, local=compute == "local", capacity=capacity, nodes=nodes)
    moe.holders = holders
    local = compute == "local"
    moe.experts.hidden_columns = partial(_hidden_columns, moe.config.hidden_dim, mesh, local)
    moe.router.reduce_counts = partial(sum_over_ranks, group=meshes.all_ranks())
    if meshes.sequence_parts > 1:
        moe.router.reduce_sequences = partial(sum_over_ranks, group=meshes.sequence_ranks())
        moe.router.sequence_parts = meshes.sequence_parts
    if compute == "local":
        _compute_with_local_weights(moe.experts, mesh["etp"])


def adapter_parameters(experts: GroupedExperts) -> list[nn.Parameter]:
    """The parameters of all adapters."""
    return [] if experts.adapters is None else list(experts.adapters.parameters())


def _hidden_columns(hidden_dim: int, mesh: DeviceMesh, local: bool, device: torch.device) -> Tensor:
    whole = torch.arange(hidden_dim, device=device)
    columns = distribute_tensor(whole, mesh, COLUMNS, src_data_rank=None)
    return columns.to_local() if local else columns


def _compute_with_local_weights(experts: GroupedExperts, etp: DeviceMesh) -> None:
    places, gradients = WEIGHTS | FACTORS, GRADIENTS

    def to_local(experts: GroupedExperts, args: tuple[Tensor, ...]) -> None:
        for owner in experts.modules():
            for name, weight in owner.named_parameters(recurse=False):
                local = from_dtensor(weight, places[name], grad_placements=gradients[name])
                # An entry of the instance's own dict is found before a parameter is.
                owner.__dict__[name] = counted_once(local, etp) if name in TERMS else local
        experts.__dict__ |= local_weights(experts)

    def to_dtensors(experts: GroupedExperts, args: tuple[Tensor, ...], output: Tensor) -> None:
        for owner in experts.modules():
            unshadow_parameters(owner, args, output)
        for name in packed_weights(experts):
            experts.__dict__.pop(name, None)

    experts.register_forward_pre_hook(to_local)
    experts.register_forward_hook(to_dtensors, always_call=True)
