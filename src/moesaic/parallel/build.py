"""Build the meshes of a layout: over all ranks, or over the ranks of a mesh that a user brings."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moesaic import ranks
from moesaic.parallel.brought import axes_of, distinct_slices, mesh_over_slices, stages_of
from moesaic.parallel.mesh import Meshes, MeshLayout, View, axis_names, resolve_layout
from moesaic.parallel.nodes import check_ranks_per_node, find_nodes, launched_per_node
from moesaic.sharding.internals import group_over_all_axes, group_that_its_ranks_make


def build_meshes(
    *,
    pp: int | None = None,
    tp: int | None = None,
    cp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    dp_shard: int | None = None,
    dp_replicate: int | None = None,
    device_type: str | None = None,
    mesh: DeviceMesh | None = None,
    expert_mesh: DeviceMesh | None = None,
    ranks_per_node: int | None = None,
) -> Meshes:
    """Build both meshes: over all ranks of the default process group, or over those of a mesh that you bring.

    Collective over the default process group, where there is one. Without one the world size is 1.

    In a pipeline the ranks of one stage share layers: with ``pp=N`` the first of N equal parts of the ranks are the
    first stage, and so on. Each stage is laid out by itself, and all get the same sizes. A mesh that is brought may
    have an axis ``pp``: then each of its slices is a stage.

    Args:
        pp, tp, cp, ep, etp, dp_shard, dp_replicate: axis sizes, see :class:`MeshLayout`. None takes the size that a
            mesh which is brought has, or else 1; ``dp_shard`` follows.
        device_type: ``"cuda"`` or ``"cpu"``; None takes that of a mesh which is brought, or else CUDA where there is a
            device.
        mesh: the dense view, from ``init_device_mesh``, or a slice of a larger mesh. It has all of the axes
            ``dp_replicate``, ``dp_shard`` and ``tp``, and perhaps ``cp`` and ``pp``. Its process groups are used.
        expert_mesh: the expert view of the same ranks, with all of the axes ``edp``, ``ep`` and ``etp``, and perhaps
            ``pp``. None makes one from ``ep`` and ``etp``.
        ranks_per_node: how many ranks in a row are on one node (machine): rank ``r`` is on node ``r //
            ranks_per_node``. Where ep spans nodes, rows then cross between nodes once a node, and are shared there
            (`two hops <multi_node.html>`_). 1 has them go straight to each rank. None takes what torchrun started on
            each node (``LOCAL_WORLD_SIZE``), and takes two hops in layers where they save a tenth of the rows that
            cross.

    Raises:
        TypeError: a size that is no integer, or a mesh that is no ``DeviceMesh``.
        ValueError: an illegal layout; ``ranks_per_node`` that does not divide the number of all ranks; a mesh that
            lacks an axis or has an unknown one; ranks that ask for other sizes than the rest; a launcher's environment
            without a process group. On all ranks, before any group is made.

    Example:
        >>> meshes = moesaic.build_meshes(tp=2, ep=2, etp=2)  # 4 ranks: dp 2 x tp 2, and ep 2 x etp 2
        >>> meshes = moesaic.build_meshes(ep=16, ranks_per_node=8)  # 16 ranks on two nodes, of which each has 8 of ep
        >>> meshes = moesaic.build_meshes(pp=2, ep=2)  # 4 ranks: two stages, each dp 2, and ep 2
        >>> names = ("pp", "dp_replicate", "dp_shard", "tp")
        >>> world = init_device_mesh("cpu", (2, 1, 2, 1), mesh_dim_names=names)
        >>> meshes = moesaic.build_meshes(mesh=world, ep=2)  # the same from a mesh that you bring
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized() and processes > 1:
        raise ValueError(
            f"this is one of {processes} processes, but there is no process group yet; call "
            "torch.distributed.init_process_group() before build_meshes()"
        )
    given = {"pp": pp, "tp": tp, "cp": cp, "ep": ep, "etp": etp, "dp_shard": dp_shard, "dp_replicate": dp_replicate}
    views: dict[View, DeviceMesh] = {}
    around: dict[View, DeviceMesh] = {}

    def claim() -> _Claim:
        if mesh is not None:
            views["dense"] = axes_of(mesh, axis_names(view="dense"), "mesh", optional=("cp",))
            around["dense"] = mesh
        if expert_mesh is not None:
            views["expert"] = axes_of(expert_mesh, axis_names(view="expert"), "expert_mesh")
            around["expert"] = expert_mesh
        check_ranks_per_node(ranks_per_node, ranks.world_size())
        stages = {view: stages_of(whole) for view, whole in around.items()}
        return _claim(given, views, stages, device_type, ranks_per_node)

    # A rank that raised alone would leave the others waiting.
    claims = ranks.together(claim)
    first = claims[0]
    if not dist.is_initialized():
        return Meshes(first.layout)
    for rank, other in enumerate(claims):
        if other[2:] != first[2:]:
            raise ValueError(f"ranks 0 and {rank} ask for different meshes: {first}; and {other}. Give all the same")
    slices = distinct_slices([claim.ranks for claim in claims])
    for view in get_args(View):
        if view not in views:
            sizes = first.layout.of_view(view)
            around[view] = mesh_over_slices(first.device_type, slices, sizes)
            views[view] = around[view][tuple(sizes)]
    with_stages = around["dense" if stages_of(around["dense"]) > 1 else "expert"]
    stages = with_stages.get_group("pp") if first.layout.pp > 1 else None
    nodes = find_nodes(ranks_per_node, [claim.launched for claim in claims], views["expert"].get_group("ep"))
    meshes = Meshes(first.layout, views, stages, nodes)
    # Made here, where every rank of the world takes part: a later stage may have no use for them.
    meshes.all_ranks()
    group_over_all_axes(meshes.expert["ep", "etp"], "ep_etp")
    meshes.sequence_ranks()
    meshes.fsdp_mesh()
    return meshes


def experts_over(ep: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """A mesh with axes ``ep, etp`` over a group that somebody else has made; etp is 1.

    Its ranks call this, and no other rank does.
    """
    alone = group_that_its_ranks_make([dist.get_rank()])
    ranks = torch.tensor(dist.get_process_group_ranks(ep)).unsqueeze(1)
    return DeviceMesh.from_group([ep, alone], device_type, ranks, mesh_dim_names=("ep", "etp"))


class _Claim(NamedTuple):
    """What one rank asks for.

    Attributes:
        ranks: those that share layers with it, in the order of its mesh.
        launched: how many ranks are on its node, as its launcher says.
        layout: sizes of all axes.
        device_type: of both meshes.
        brought: the views that it brings.
        ranks_per_node: how many ranks are on each node, as the user says.
    """

    ranks: tuple[int, ...]
    launched: int | None
    layout: MeshLayout
    device_type: str
    brought: tuple[View, ...]
    ranks_per_node: int | None

    def __str__(self) -> str:
        brought = f", {' and '.join(self.brought)} mesh brought" if self.brought else ""
        nodes = f", {self.ranks_per_node} ranks a node" if self.ranks_per_node else ""
        return f"{self.layout}, on {self.device_type}{brought}{nodes}"


def _check_device_type(device_type: Any) -> None:
    if device_type is None:
        return
    try:
        device = torch.device(device_type)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type != device_type:
        hint = "" if device is None else f", without a number: {device.type!r}"
        raise ValueError(f"device_type: got {device_type!r}; give 'cuda' or 'cpu'{hint}")


def _claim(
    given: Mapping[str, int | None],
    views: Mapping[View, DeviceMesh],
    stages: Mapping[View, int],
    device_type: str | None,
    ranks_per_node: int | None,
) -> _Claim:
    """What follows from the sizes and the meshes that a rank was given; ``stages`` is how many these have.

    Raises:
        ValueError: they contradict each other, or are not a legal layout.
    """
    sizes = {name: size for name, size in given.items() if size is not None}
    if len(set(stages.values())) > 1:
        raise ValueError(
            f"expert_mesh: it has {stages['expert']} stages (pp), and mesh {stages['dense']}; bring both with pp, or "
            "leave expert_mesh out"
        )
    for view, mesh in views.items():
        argument = "mesh" if view == "dense" else "expert_mesh"
        own = {"pp": stages[view], **dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))}
        for name in own.keys() & sizes.keys():
            if sizes[name] != own[name]:
                raise ValueError(f"{name}: got {sizes[name]}, and {argument} has {own[name]}; leave {name} out")
        if device_type not in (None, mesh.device_type):
            raise ValueError(
                f"device_type: got {device_type!r}, and {argument} is on {mesh.device_type!r}; leave it out"
            )
        device_type = mesh.device_type
        sizes |= {name: size for name, size in own.items() if name in given}
    members_of = {view: tuple(mesh.mesh.flatten().tolist()) for view, mesh in views.items()}
    if len({frozenset(members) for members in members_of.values()}) > 1:
        raise ValueError(
            f"expert_mesh: it is over ranks {list(members_of['expert'])}, and mesh over {list(members_of['dense'])}; "
            "bring two views of the same ranks"
        )
    members = next(iter(members_of.values()), ())
    world_size = len(members) * sizes.get("pp", 1) if views else ranks.world_size()
    try:
        layout = resolve_layout(world_size, **sizes)
    except ValueError as error:
        what = "A stage" if sizes.get("pp", 1) > 1 else "The world"
        whole = f" {what} is here the mesh that was brought, over ranks {list(members)}." if views else ""
        raise ValueError(f"{error}{whole}") from None
    if not views:
        first = ranks.rank() // layout.stage_size * layout.stage_size
        members = tuple(range(first, first + layout.stage_size))
    _check_device_type(device_type)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return _Claim(members, launched_per_node(), layout, device_type, tuple(views), ranks_per_node)
