"""Which ranks talk to one another, and which of them are in one node.

Ranks are numbered as ``build_meshes`` does: the last axis of a view is the innermost.
"""

from functools import cache
from itertools import product
from math import prod
from typing import NamedTuple

from moesaic.parallel.mesh import MeshLayout, View


class Group(NamedTuple):
    """A group of ranks.

    Attributes:
        size: how many there are.
        near: how many of them are in the node of the first, itself among them.
    """

    size: int
    near: int


@cache
def group_of(layout: MeshLayout, view: View | None, axes: tuple[str, ...], per_node: int) -> Group:
    """The first rank's group over some axes of a view, or over ``pp`` where the view is None."""
    sizes = {"pp": layout.pp} if view is None else layout.of_view(view)
    inner = layout.stage_size if view is None else 1
    names = list(sizes)
    strides = {name: inner * prod(sizes[n] for n in names[i + 1 :]) for i, name in enumerate(names)}
    places = product(*(range(sizes[name]) for name in axes))
    members = [sum(strides[name] * at for name, at in zip(axes, place, strict=True)) for place in places]
    return Group(len(members), sum(member < per_node for member in members))
