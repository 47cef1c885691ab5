"""Which ranks have parts of a matrix, and which part each has.

A parameter is one matrix ``[M, N]``, or E of them, ``[E, M, N]``. Mesh axes that cut the expert dim leave matrices
whole, and the ranks along them have nothing to do with each other. Those along the other axes hold parts or copies of
the same matrices: the holders.
"""

import functools
from collections.abc import Iterable, MutableMapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.sharding.internals import Box, box_within, group_that_its_ranks_make

# Layers have many parameters of one shape, and meshes many ranks.
_box = functools.lru_cache(maxsize=1 << 16)(box_within)

# Groups that were made here, by the axes of the mesh that they join.
Groups = MutableMapping[tuple[int, ...], dist.ProcessGroup]


class Holders(NamedTuple):
    """The ranks that share the matrices of which this rank has a part.

    Attributes:
        group: those ranks; None if this rank has them alone.
        me: this rank's number among them.
        boxes: the part of the parameter on each. The experts are the same on all of them.
        copies: to which copy of the matrices the part of each belongs.
    """

    group: dist.ProcessGroup | None
    me: int
    boxes: tuple[Box, ...]
    copies: tuple[int, ...]

    @property
    def experts(self) -> int:
        """How many matrices they share."""
        first = self.boxes[self.me][0]
        return first.stop - first.start


def holders_of(parameter: Tensor, groups: Groups) -> Holders:
    """The holders of a parameter, with boxes of three dims. Collective among them, where they have no group yet."""
    if not isinstance(parameter, DTensor):
        return _alone(tuple(slice(0, size) for size in parameter.shape))
    mesh = parameter.device_mesh
    place = mesh.get_coordinate()
    if place is None:  # not on the mesh
        return _alone((slice(0, 0),) * 3)
    axes = [
        axis
        for axis, placement in enumerate(parameter.placements)
        if mesh.size(axis) > 1 and not (parameter.ndim == 3 and getattr(placement, "dim", None) == 0)
    ]
    copied = [axis for axis in axes if parameter.placements[axis].is_replicate()]
    found: dict[int, tuple[Box, int]] = {}
    for steps in product(*(range(mesh.size(axis)) for axis in axes)):
        moved = dict(zip(axes, steps, strict=True))
        there = [moved.get(axis, step) for axis, step in enumerate(place)]
        copy = 0
        for axis in copied:
            copy = copy * mesh.size(axis) + there[axis]
        found[int(mesh.mesh[tuple(there)])] = (_of_three_dims(_box_at(parameter, there)), copy)
    if len(found) == 1:
        group, order = None, list(found)
    else:
        group = mesh.get_group(axes[0]) if len(axes) == 1 else _joined(tuple(sorted(found)), groups)
        order = dist.get_process_group_ranks(group)
    me = order.index(dist.get_rank())
    boxes, copies = zip(*(found[rank] for rank in order), strict=True)
    return Holders(group, me, boxes, copies)


def _alone(box: Box) -> Holders:
    return Holders(None, 0, (_of_three_dims(box),), (0,))


def placement_problem(parameter: DTensor) -> str | None:
    """Why matrices cannot be put together from the parts on all ranks, if so."""
    mesh, placements = parameter.device_mesh, parameter.placements
    partial = next((p for p in placements if p.is_partial()), None)
    if partial is not None:
        return f"is {partial} on a mesh axis: a sum that is still to be made"
    cutting = [axis for axis, p in enumerate(placements) if not p.is_replicate()]
    places = product(*(range(mesh.size(axis)) if axis in cutting else (0,) for axis in range(mesh.ndim)))
    covered = sum(prod(s.stop - s.start for s in _box_at(parameter, place)) for place in places)
    place = mesh.get_coordinate()
    own = parameter.to_local().shape
    here = None if place is None else tuple(s.stop - s.start for s in _box_at(parameter, place))
    if covered != parameter.numel() or here not in (None, tuple(own)):
        return f"with placements {list(placements)} has parts that are not blocks of rows and columns"
    return None


def groups_of_meshes(parameters: Iterable[Tensor], groups: Groups) -> list[dist.ProcessGroup]:
    """The ranks of each mesh that parameters are on, without those of one rank. Collective where they are new."""
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for parameter in parameters:
        if isinstance(parameter, DTensor) and (mesh := parameter.device_mesh).get_coordinate() is not None:
            members = tuple(sorted(mesh.mesh.flatten().tolist()))
            if len(members) > 1 and members not in found:
                found[members] = mesh.get_group() if mesh.ndim == 1 else _joined(members, groups)
    return list(found.values())


def _joined(ranks: tuple[int, ...], groups: Groups) -> dist.ProcessGroup:
    """A group over several axes of a mesh. Only its ranks make it: stages of a pipeline have other parameters."""
    if ranks not in groups:
        world = dist.group.WORLD
        everyone = world is not None and len(ranks) == world.size()
        groups[ranks] = world if everyone else group_that_its_ranks_make(ranks)
    return groups[ranks]


def _box_at(parameter: DTensor, place: Sequence[int]) -> Box:
    return _box(parameter.shape, parameter.device_mesh.shape, tuple(parameter.placements), tuple(place))


def _of_three_dims(box: Box) -> Box:
    return box if len(box) == 3 else (slice(0, 1), *box)
