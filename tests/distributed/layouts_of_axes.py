"""A covering design of layouts: few of them, and every few choices that can go together are together in one.

A design of strength t has, for any t axes, every combination of their sizes that some layout of so many ranks has. So
what goes wrong between t axes goes wrong in one of its layouts. A new axis is a line in ``AXES``, and a name in
``_DENSE`` or ``_EXPERT``.
"""

import functools
from itertools import combinations, product
from math import prod

# The sizes that an axis may have, the smaller ones first. pp is around the others.
AXES: dict[str, tuple[int, ...]] = {
    "pp": (1, 2, 4),
    "dp_replicate": (1, 2),
    "dp_shard": (1, 2, 4),
    "cp": (1, 2),
    "tp": (1, 2, 4),
    "ep": (1, 2, 4),
    "etp": (1, 2, 4),
}
_DENSE = ("dp_replicate", "dp_shard", "cp", "tp")
_EXPERT = ("ep", "etp")

Layout = dict[str, int]


def world_size(layout: Layout) -> int:
    """How many ranks a layout has."""
    return layout["pp"] * prod(layout[axis] for axis in _DENSE)


def candidates(most_ranks: int) -> list[Layout]:
    """Every layout of at most so many ranks, the smaller ones first."""
    every = (dict(zip(AXES, sizes, strict=True)) for sizes in product(*AXES.values()))
    legal = [
        layout
        for layout in every
        if world_size(layout) <= most_ranks
        and world_size(layout) // layout["pp"] % prod(layout[axis] for axis in _EXPERT) == 0
    ]
    return sorted(legal, key=world_size)


@functools.cache
def _covering(strength: int, most_ranks: int) -> tuple[tuple[int, ...], ...]:
    def pairs(layout: Layout) -> set[tuple[tuple[str, int], ...]]:
        # edp is an axis, too, though it follows.
        edp = world_size(layout) // layout["pp"] // prod(layout[axis] for axis in _EXPERT)
        return set(combinations({**layout, "edp": edp}.items(), strength))

    open_ = {tuple(layout.values()): pairs(layout) for layout in candidates(most_ranks)}
    left = set().union(*open_.values())
    chosen = []
    while left:
        # The one with most that is new; of equals the first, which is the smallest.
        best = max(open_, key=lambda sizes: len(open_[sizes] & left))
        left -= open_[best]
        chosen.append(best)
    return tuple(chosen)


def covering(strength: int, most_ranks: int = 8) -> list[Layout]:
    """A design of this strength, of layouts of at most so many ranks. The same at every call."""
    return [dict(zip(AXES, sizes, strict=True)) for sizes in _covering(strength, most_ranks)]
