"""The same ranks seen twice: a dense mesh for tokens, an expert mesh for expert weights.

Dense view: ``dp_replicate x dp_shard x cp x tp``. Expert view: ``edp x ep x etp``. Both products are the number of
ranks that share layers: all ranks, or in a pipeline those of one stage, of which there are ``pp``. ``edp`` follows.
Neither ``ep`` nor ``etp`` has to divide anything of the dense view.

:class:`MeshLayout` is the table of axes: the meshes, their shapes and what is legal follow from its fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product
from math import prod
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moesaic.ops.arguments import check_int, divisors
from moesaic.parallel.nodes import Nodes
from moesaic.parallel.sequence import positions_of_parts, sequence_slices
from moesaic.sharding.internals import axes_as_one, group_over_all_axes

View = Literal["dense", "expert"]


def _axis(view: View | None, *, takes_the_rest: bool = False, has_own_sequences: bool = False) -> Any:
    """An axis of the mesh of ``view``.

    Args:
        view: which mesh; None for the axis around both.
        takes_the_rest: its size, where it is not given, is what is left of the world size.
        has_own_sequences: its ranks hold different sequences.
    """
    return field(metadata={"view": view, "takes_the_rest": takes_the_rest, "has_own_sequences": has_own_sequences})


@dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """Sizes of all axes. The last axis of each view is the innermost: its ranks are neighbours.

    Attributes:
        pp: pipeline parallel: ranks along it hold other layers. It is around both views, and so the outermost.
        dp_replicate: data parallel, parameters replicated.
        dp_shard: data parallel, parameters sharded (FSDP).
        cp: context parallel: ranks have parts of the same sequences, and parameters are sharded over them, too.
        tp: tensor and sequence parallel.
        edp: data parallel of the experts, parameters sharded.
        ep: expert parallel; each rank has ``ceil(E / ep)`` experts, the last ones what is left.
        etp: tensor parallel inside an expert; each rank has ``ceil(F / etp)`` of its hidden dim, likewise.
    """

    pp: int = _axis(None)
    dp_replicate: int = _axis("dense", has_own_sequences=True)
    dp_shard: int = _axis("dense", has_own_sequences=True, takes_the_rest=True)
    cp: int = _axis("dense")
    tp: int = _axis("dense")
    edp: int = _axis("expert", takes_the_rest=True)
    ep: int = _axis("expert")
    etp: int = _axis("expert")

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """The ranks that share layers."""
        return prod(self.of_view("dense").values())

    @property
    def dp_size(self) -> int:
        """How many ranks hold different sequences."""
        return prod(getattr(self, name) for name in axis_names(has_own_sequences=True))

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        """The axes whose ranks have parts of the same sequences, where there is more than one rank."""
        names = axis_names(view="dense", has_own_sequences=False)
        return tuple(name for name in names if getattr(self, name) > 1)

    @property
    def sequence_parts(self) -> int:
        """How many ranks hold parts of the same sequences."""
        return prod(getattr(self, name) for name in self.sequence_axes)

    def of_view(self, view: View) -> dict[str, int]:
        """Sizes of the axes of one mesh by name, the outermost first."""
        return {name: getattr(self, name) for name in axis_names(view=view)}

    def __str__(self) -> str:
        sizes = {view: self.of_view(view) for view in get_args(View)}
        if self.cp == 1:
            del sizes["dense"]["cp"]
        dense, expert = (" x ".join(f"{name} {size}" for name, size in of.items()) for of in sizes.values())
        return f"{f'pp {self.pp}, each ' if self.pp > 1 else ''}{dense}, experts {expert}"


@cache
def axis_names(**marks: Any) -> tuple[str, ...]:
    """Axes that are so marked, in the order of their mesh."""
    return tuple(f.name for f in fields(MeshLayout) if all(f.metadata[mark] == value for mark, value in marks.items()))


def resolve_layout(
    world_size: int,
    *,
    pp: int = 1,
    tp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    dp_shard: int | None = None,
    dp_replicate: int = 1,
) -> MeshLayout:
    """Check a layout, and work out ``edp`` and, where it is None, ``dp_shard``. Touches no process group.

    With ``pp`` above 1 the other axes share the ranks of one stage, ``world_size / pp``.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1, or a product that is not the world size, with the nearest legal choices.

    Example:
        >>> print(resolve_layout(4, tp=2, ep=2, etp=2))
        dp_replicate 1 x dp_shard 2 x tp 2, experts edp 1 x ep 2 x etp 2
        >>> print(resolve_layout(8, pp=2, ep=4))
        pp 2, each dp_replicate 1 x dp_shard 4 x tp 1, experts edp 1 x ep 4 x etp 1
    """
    sizes = {"pp": pp, "tp": tp, "cp": cp, "ep": ep, "etp": etp}
    sizes |= {"dp_replicate": dp_replicate, "dp_shard": dp_shard}
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, size in {"world_size": world_size, **given}.items():
        check_int(name, size)
        if size < 1:
            raise ValueError(f"{name}: must be at least 1, got {size}")
    if world_size % pp:
        raise ValueError(f"pp = {pp} must divide the world size {world_size}. {_suggest({'pp': pp}, world_size)}")
    views = (_resolve(view, given, world_size // pp, pp) for view in get_args(View))
    return MeshLayout(pp=pp, **{name: size for sizes in views for name, size in sizes.items()})


def _resolve(view: View, given: dict[str, int], world_size: int, pp: int) -> dict[str, int]:
    """Sizes of the axes of one view, ``world_size`` in all: of all ranks, or of those of one of ``pp`` stages."""
    names, (rest,) = axis_names(view=view), axis_names(view=view, takes_the_rest=True)
    sizes = {name: given[name] for name in names if name in given}
    world = "world size" if pp == 1 else "size of a stage"
    whole, size = f"{' * '.join(names)} = {world}{'' if pp == 1 else ' = world size / pp'}", prod(sizes.values())
    said = f"{' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))} = {size}"
    nearest = _suggest({name: n for name, n in sizes.items() if name != rest}, world_size)
    if rest in sizes and size != world_size:
        raise ValueError(
            f"{said} must equal the {world} {world_size}. Leave {rest} out to have it worked out. {nearest}"
        )
    if world_size % size:
        raise ValueError(f"{said} must divide the {world} {world_size} ({whole}). {nearest}")
    return {rest: world_size // size, **sizes}


def _suggest(wanted: dict[str, int], world_size: int) -> str:
    """The legal sizes nearest to some whose product has to divide the world size."""
    legal = [sizes for sizes in product(divisors(world_size), repeat=len(wanted)) if world_size % prod(sizes) == 0]
    legal.sort(key=lambda sizes: (sum(abs(n - w) for n, w in zip(sizes, wanted.values(), strict=True)), -prod(sizes)))
    said = (", ".join(f"{name}={n}" for name, n in zip(wanted, sizes, strict=True)) for sizes in legal[:3])
    return f"Nearest legal choices: {'; '.join(said)}."


def sizes_in(settings: Any) -> dict[str, Any]:
    """The sizes of those axes that settings have a field for, as :func:`build_meshes` takes them."""
    return {name: getattr(settings, name) for name in axis_names() if hasattr(settings, name)}


@dataclass(frozen=True)
class Meshes:
    """Both views of the ranks. Without a process group (one process) there are no meshes, and all sizes are 1.

    Attributes:
        layout: sizes of all axes.
        views: the meshes ``"dense"`` and ``"expert"`` of the ranks that share layers; empty without a process group.
        stages: in a pipeline, the group of one rank of each stage, this one's own among them, in the order of ``pp``.
            None where ``pp`` is 1.
        nodes: which ranks are on one node, and so how rows are exchanged between them.
    """

    layout: MeshLayout
    views: Mapping[View, DeviceMesh] = field(default_factory=dict)
    stages: dist.ProcessGroup | None = None
    nodes: Nodes = field(default_factory=Nodes)

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, and so meshes."""
        return bool(self.views)

    @property
    def dense(self) -> DeviceMesh:
        """The mesh with axes ``dp_replicate, dp_shard, cp, tp``. One that was brought may lack ``cp``.

        Raises:
            ValueError: there is no process group. Ask ``is_distributed`` first, or take ``device_type``.
        """
        return self._view("dense")

    @property
    def expert(self) -> DeviceMesh:
        """The mesh with axes ``edp, ep, etp``.

        Raises:
            ValueError: there is no process group. Ask ``is_distributed`` first, or take ``device_type``.
        """
        return self._view("expert")

    def _view(self, view: View) -> DeviceMesh:
        if view not in self.views:
            raise ValueError(
                f"meshes.{view}: one process without a process group has no meshes; ask meshes.is_distributed first, "
                "or start the program with torchrun and call torch.distributed.init_process_group() before "
                "build_meshes()"
            )
        return self.views[view]

    @property
    def device_type(self) -> str | None:
        """Where the ranks compute, ``"cuda"`` or ``"cpu"``; None without a process group."""
        return self.dense.device_type if self.is_distributed else None

    def all_ranks(self) -> dist.ProcessGroup:
        """The group of every rank of the meshes, in a pipeline of every rank of this stage.

        Collective on its first call, which :func:`build_meshes` makes.
        """
        return group_over_all_axes(self.expert, "edp_ep_etp")

    @property
    def dp_size(self) -> int:
        """How many ranks hold different sequences."""
        return self.layout.dp_size

    @property
    def dp_rank(self) -> int:
        """Which of them this is."""
        rank = 0
        for axis in axis_names(has_own_sequences=True) if self.is_distributed else ():
            rank = rank * getattr(self.layout, axis) + self.dense.get_local_rank(axis)
        return rank

    @property
    def pp_size(self) -> int:
        """How many stages there are, each on ranks of its own."""
        return self.layout.pp

    @property
    def pp_rank(self) -> int:
        """Which of them this rank has a part of; the first is 0."""
        return 0 if self.stages is None else dist.get_rank(self.stages)

    @property
    def cp_size(self) -> int:
        return self.layout.cp

    @property
    def cp_rank(self) -> int:
        return self.dense.get_local_rank("cp") if self.cp_size > 1 else 0

    @property
    def tp_size(self) -> int:
        return self.layout.tp

    @property
    def tp_rank(self) -> int:
        return self.dense.get_local_rank("tp") if self.is_distributed else 0

    @property
    def has_own_tokens(self) -> bool:
        """Whether FSDP has something to do for dense parameters: ranks besides those of tp have tokens of their own."""
        return self.dp_size * self.cp_size > 1

    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh over which FSDP lays dense parameters: replicated, if at all, over its first axis.

        Where there is cp, its ranks have tokens of their own, so it is taken together with ``dp_shard``. Collective on
        its first call.
        """
        before = ("dp_replicate",) if self.layout.dp_replicate > 1 else ()
        if self.cp_size == 1:
            return self.dense[*before, "dp_shard"]
        return axes_as_one(self.dense, ("dp_shard", "cp"), before)

    @property
    def sequence_parts(self) -> int:
        """How many ranks hold parts of the same sequences."""
        return self.layout.sequence_parts

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        """The axes whose ranks have parts of the same sequences, where there is more than one rank."""
        return self.layout.sequence_axes

    def sequence_ranks(self) -> dist.ProcessGroup:
        """The group of the ranks that hold parts of the same sequences. Collective on its first call."""
        if self.cp_size == 1:
            return self.dense.get_group("tp")
        return group_over_all_axes(self.dense["cp", "tp"], "cp_tp")

    def sequence_positions(self, length: int) -> Tensor:
        """The positions ``[s]`` of a sequence of so many tokens that this rank has, in the order in which it has them.

        Use it as an index, on whatever has a dim of positions: ``targets[:, meshes.sequence_positions(S)]``. The ranks
        of cp have two pieces each, see :mod:`moesaic.parallel.sequence`, and those of tp share these in equal parts.
        The last parts may be short or empty.
        """
        parts = positions_of_parts(length, self.cp_size, self.tp_size)
        return parts[self.cp_rank * self.tp_size + self.tp_rank]

    def sequence_slice(self, length: int) -> slice:
        """The same as a slice, where cp is 1: ``Shard`` as DTensor cuts it, so the last may be short or empty.

        Raises:
            ValueError: cp is more than 1, where a rank has two pieces of a sequence.
        """
        if self.cp_size > 1:
            raise ValueError(
                f"sequence_slice: with cp {self.cp_size} a rank has two pieces of each sequence, which are no slice; "
                "use meshes.sequence_positions(length)"
            )
        return sequence_slices(length, self.tp_size)[self.tp_rank]


def check_meshes(meshes: Any) -> None:
    """Raise ``TypeError`` unless these are meshes of ours."""
    if not isinstance(meshes, Meshes):
        raise TypeError(
            f"meshes: expected the result of moesaic.build_meshes(), got {type(meshes).__name__}; without a process "
            "group build_meshes() gives those of one process"
        )
