"""torchtitan's ``ep`` ranks, seen as ep x etp.

FSDP2 puts its ``efsdp`` axis in front of the mesh on which a parameter lies. For that it wants both meshes to number
all ranks of the world alike. So the mesh made here has torchtitan's axes before its own, with their process groups.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed import ParallelDims

from moesaic.sharding.internals import group_that_its_ranks_make


class ExpertMesh(NamedTuple):
    """The mesh with axes ``ep, etp``, and the group of all of its ranks."""

    mesh: DeviceMesh
    everyone: dist.ProcessGroup


def expert_mesh(parallel_dims: ParallelDims, etp: int) -> ExpertMesh | None:
    """The ranks of torchtitan's ``ep`` axis as (ep, etp), made once for all layers; None without expert parallelism.

    Collective over the ranks of that axis and no others. Stages of a pipeline that have no experts need not call it.

    Raises:
        ValueError: ``etp`` does not divide ``expert_parallel_degree``, or the backend has no place for it.
    """
    ranks = parallel_dims.get_optional_mesh("ep")
    if etp > 1:
        check_etp(parallel_dims, etp)
    if ranks is None:
        return None
    # As long as the meshes of torchtitan live, and no longer.
    made: dict[int, ExpertMesh] = vars(parallel_dims).setdefault("_moesaic_expert_meshes", {})
    if etp not in made:
        made[etp] = _make(parallel_dims, ranks, etp)
    return made[etp]


def check_etp(parallel_dims: ParallelDims, etp: int) -> None:
    """Raise ``ValueError`` unless the ranks of torchtitan's ``ep`` axis can be seen as (ep, etp)."""
    if parallel_dims.ep % etp:
        raise ValueError(
            f"etp: {etp} does not divide expert_parallel_degree {parallel_dims.ep}, which is ep * etp here; "
            f"set --parallelism.expert_parallel_degree to a multiple of {etp}"
        )
    if parallel_dims.spmd_backend != "partial_dtensor":
        raise ValueError(
            f"etp: {etp} needs weights on a mesh of two axes, and spmd_backend {parallel_dims.spmd_backend!r} keeps "
            "them on torchtitan's own; set --parallelism.spmd_backend partial_dtensor"
        )


def _make(parallel_dims: ParallelDims, ranks: DeviceMesh, etp: int) -> ExpertMesh:
    outer = ("pp", "dp_replicate", "efsdp")
    axes = [parallel_dims.get_optional_mesh(name, include_singleton_axes=True) for name in outer]
    shape = [axis.size() for axis in axes if axis is not None]
    numbers = torch.arange(dist.get_world_size()).view(*shape, ranks.size() // etp, etp)
    everyone = ranks.get_group()
    here = torch.tensor(dist.get_process_group_ranks(everyone)).view(-1, etp)
    row, column = divmod(dist.get_group_rank(everyone, dist.get_rank()), etp)
    groups = [axis.get_group() for axis in axes if axis is not None]
    groups += [_group(here[:, column], everyone), _group(here[row], everyone)]
    names = (*outer, "ep", "etp")
    whole = DeviceMesh.from_group(groups, ranks.device_type, numbers, mesh_dim_names=names)
    return ExpertMesh(whole["ep", "etp"], everyone)


def _group(ranks: torch.Tensor, everyone: dist.ProcessGroup) -> dist.ProcessGroup:
    if len(ranks) == everyone.size():
        return everyone
    # Only these ranks come here: other stages of a pipeline may have no experts.
    return group_that_its_ranks_make(ranks.tolist())
