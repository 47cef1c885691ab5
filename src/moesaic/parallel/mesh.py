"""The same ranks seen twice: a dense mesh for tokens, an expert mesh for expert weights.

Dense view: ``dp_replicate x dp_shard x tp``. Expert view: ``edp x ep x etp``. Both products are the world size; ``edp``
follows. Neither ``ep`` nor ``etp`` has to divide anything of the dense view.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesaic.sharding.internals import group_over_all_axes


@dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """Sizes of all axes.

    Attributes:
        dp_replicate: data parallel, parameters replicated.
        dp_shard: data parallel, parameters sharded (FSDP).
        tp: tensor and sequence parallel.
        edp: data parallel of the experts, parameters sharded.
        ep: expert parallel; each rank has ``ceil(E / ep)`` experts, the last ones what is left.
        etp: tensor parallel inside an expert; each rank has ``ceil(F / etp)`` of its hidden dim, likewise.
    """

    dp_replicate: int
    dp_shard: int
    tp: int
    edp: int
    ep: int
    etp: int

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp

    def __str__(self) -> str:
        dense = f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x tp {self.tp}"
        return f"{dense}, experts edp {self.edp} x ep {self.ep} x etp {self.etp}"


def resolve_layout(
    world_size: int, *, tp: int = 1, ep: int = 1, etp: int = 1, dp_shard: int | None = None, dp_replicate: int = 1
) -> MeshLayout:
    """Check a layout, and work out ``edp`` and, where it is None, ``dp_shard``. Touches no process group.

    Raises:
        ValueError: a product that is not the world size, with the nearest legal choices.

    Example:
        >>> print(resolve_layout(4, tp=2, ep=2, etp=2))
        dp_replicate 1 x dp_shard 2 x tp 2, experts edp 1 x ep 2 x etp 2
    """
    given = {"world_size": world_size, "tp": tp, "ep": ep, "etp": etp, "dp_replicate": dp_replicate}
    for name, value in {**given, "dp_shard": 1 if dp_shard is None else dp_shard}.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if dp_shard is None:
        if world_size % (dp_replicate * tp):
            raise ValueError(
                f"dp_replicate * tp = {dp_replicate} * {tp} = {dp_replicate * tp} must divide the world size "
                f"{world_size} (dp_replicate * dp_shard * tp = world size). "
                + _suggest({"dp_replicate": dp_replicate, "tp": tp}, world_size)
            )
        dp_shard = world_size // (dp_replicate * tp)
    elif dp_replicate * dp_shard * tp != world_size:
        raise ValueError(
            f"dp_replicate * dp_shard * tp = {dp_replicate} * {dp_shard} * {tp} = {dp_replicate * dp_shard * tp} must "
            f"equal the world size {world_size}. Leave dp_shard out to have it worked out. "
            + _suggest({"dp_replicate": dp_replicate, "tp": tp}, world_size)
        )
    if world_size % (ep * etp):
        raise ValueError(
            f"ep * etp = {ep} * {etp} = {ep * etp} must divide the world size {world_size} "
            f"(edp * ep * etp = world size). " + _suggest({"ep": ep, "etp": etp}, world_size)
        )
    return MeshLayout(dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp, edp=world_size // (ep * etp), ep=ep, etp=etp)


def _suggest(wanted: dict[str, int], world_size: int) -> str:
    """The legal pairs nearest to a pair whose product has to divide the world size."""
    (name_a, a), (name_b, b) = wanted.items()
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    legal = [(x, y) for x in divisors for y in divisors if world_size % (x * y) == 0]
    legal.sort(key=lambda pair: (abs(pair[0] - a) + abs(pair[1] - b), -pair[0] * pair[1]))
    return "Nearest legal choices: " + "; ".join(f"{name_a}={x}, {name_b}={y}" for x, y in legal[:3]) + "."


@dataclass(frozen=True)
class Meshes:
    """Both views of the ranks. Without a process group (one process) there are no meshes, and the sizes are 1.

    Attributes:
        layout: sizes of all axes.
        dense: mesh with axes ``dp_replicate, dp_shard, tp``.
        expert: mesh with axes ``edp, ep, etp``.
    """

    layout: MeshLayout
    dense: DeviceMesh | None
    expert: DeviceMesh | None

    def all_ranks(self) -> dist.ProcessGroup:
        """The group of every rank of the meshes. Collective on its first call."""
        assert self.dense is not None
        return group_over_all_axes(self.dense, "dp_tp")

    @property
    def dp_size(self) -> int:
        """How many ranks hold different sequences."""
        return self.layout.dp_replicate * self.layout.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which of them this is."""
        if self.dense is None:
            return 0
        return self.dense.get_local_rank("dp_replicate") * self.layout.dp_shard + self.dense.get_local_rank("dp_shard")

    @property
    def tp_size(self) -> int:
        return self.layout.tp

    @property
    def tp_rank(self) -> int:
        return 0 if self.dense is None else self.dense.get_local_rank("tp")

    def sequence_slice(self, length: int) -> slice:
        """This rank's shard of a sequence: ``Shard`` as DTensor cuts it, so the last shards may be short or empty."""
        return sequence_slices(length, self.tp_size)[self.tp_rank]


def sequence_slices(length: int, num_shards: int) -> list[slice]:
    """How ``Shard`` cuts a length: pieces of ``ceil(length / num_shards)``, the last ones short or empty."""
    size = -(-length // num_shards)
    return [slice(min(i * size, length), min((i + 1) * size, length)) for i in range(num_shards)]


def build_meshes(
    *,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    dp_shard: int | None = None,
    dp_replicate: int = 1,
    device_type: str | None = None,
) -> Meshes:
    """Build both meshes over all ranks of the default process group.

    Collective where there is a process group. Without one the world size is 1.

    Args:
        tp, ep, etp, dp_shard, dp_replicate: axis sizes, see :class:`MeshLayout`; ``dp_shard`` follows if None.
        device_type: ``"cuda"`` or ``"cpu"``; None takes CUDA where there is a device.

    Raises:
        ValueError: an illegal layout, or a launcher's environment without a process group; before any collective.

    Example:
        >>> meshes = moesaic.build_meshes(tp=2, ep=2, etp=2)  # 4 ranks: dp 2 x tp 2, and ep 2 x etp 2
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized() and launched > 1:
        raise ValueError(
            f"this is one of {launched} processes, but there is no process group yet; call "
            "torch.distributed.init_process_group() before build_meshes()"
        )
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    layout = resolve_layout(world_size, tp=tp, ep=ep, etp=etp, dp_shard=dp_shard, dp_replicate=dp_replicate)
    if not dist.is_initialized():
        return Meshes(layout, None, None)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    dense_shape = (layout.dp_replicate, layout.dp_shard, layout.tp)
    dense = init_device_mesh(device_type, dense_shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    expert_shape = (layout.edp, layout.ep, layout.etp)
    expert = init_device_mesh(device_type, expert_shape, mesh_dim_names=("edp", "ep", "etp"))
    return Meshes(layout, dense, expert)
