"""Meshes that users bring: which of their axes are ours, and the meshes that go beside them."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Ranks along these hold other layers. Each of their slices is laid out by itself.
_OTHER_LAYERS = ("pp",)


def axes_of(mesh: DeviceMesh, names: Sequence[str], argument: str, optional: Sequence[str] = ()) -> DeviceMesh:
    """The axes ``names`` of a mesh, which may have ``pp`` beside them, and may lack those that are ``optional``.

    Raises:
        ValueError: an axis is missing, or one is not known; this rank is not in the mesh. The text begins with
            ``argument``.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{argument}: expected a DeviceMesh, got {type(mesh).__name__}; "
            "torch.distributed.device_mesh.init_device_mesh makes one"
        )
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    said = " x ".join(f"{name} {size}" for name, size in sizes.items())
    has = f"it has {said}" if sizes else "its axes have no names"
    names = [name for name in names if name in sizes or name not in optional]
    missing = [name for name in names if name not in sizes]
    unknown = [name for name in sizes if name not in (*names, *_OTHER_LAYERS)]
    if unknown:
        raise ValueError(
            f"{argument}: its axes have to be {', '.join(names)}, and pp if there is one; {has}. If ranks along "
            f"{unknown[0]!r} hold the same layers, give that axis one of these names. If they hold other layers, leave "
            f"it out: {argument}[{', '.join(map(repr, names))}]"
        )
    if missing:
        whole = {name: sizes[name] for name in _OTHER_LAYERS if name in sizes}
        whole |= {name: sizes.get(name, 1) for name in names}
        example = (
            f", such as init_device_mesh({mesh.device_type!r}, {tuple(whole.values())}, mesh_dim_names={tuple(whole)})"
        )
        raise ValueError(
            f"{argument}: it has no axis {', '.join(map(repr, missing))}; {has}. All of {', '.join(names)} have to be "
            f"there, also with size 1{example if sizes else ''}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{argument}: rank {dist.get_rank()} is not in it; every rank brings the mesh of the ranks that share its "
            "layers"
        )
    return mesh[tuple(names)]


def stages_of(mesh: DeviceMesh) -> int:
    """How many stages a mesh has: the size of its axis ``pp``, 1 without one."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)).get("pp", 1)


def mesh_over_slices(device_type: str, slices: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> DeviceMesh:
    """A mesh with axes ``sizes`` over each slice, and ``pp`` around them. Collective."""
    axes = sizes if len(slices) == 1 else {"pp": len(slices), **sizes}
    ranks = torch.tensor(slices).view(*axes.values())
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(axes))


def distinct_slices(everyone: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The slices of ranks that make up the world, from what each rank says of its own.

    Raises:
        ValueError: they overlap, or differ in size.
    """
    slices = list(dict.fromkeys(map(tuple, everyone)))
    if sum(map(len, slices)) != len(everyone) or len(set(map(len, slices))) != 1:
        said = ", ".join(str(list(members)) for members in slices)
        raise ValueError(
            f"mesh: the ranks bring meshes over ranks {said}. These overlap or differ in size; ranks that share layers "
            "bring the same mesh, and all stages have equally many ranks"
        )
    return slices
