"""A layout: sizes of mesh axes by name, how many ranks it takes, and which ranks each axis joins."""

import math
from collections.abc import Iterator, Mapping
from itertools import combinations

from moesaic.testing.errors import CheckError
from moesaic.testing.pool import MAX_WORLD_SIZE

# The same ranks seen twice, the outermost axis first. An axis of another name goes before tp in the dense view.
DENSE = ("pp", "dp_replicate", "dp", "dp_shard", "fsdp", "cp", "tp")
EXPERT = ("pp", "edp", "ep", "etp")
# Axes whose ranks hold different sequences.
DATA = ("dp_replicate", "dp", "dp_shard", "fsdp")


class Layout(dict[str, int]):
    """Sizes of mesh axes by name, as the user gave them, and the number of ranks they take.

    The dense axes ``pp dp_replicate dp dp_shard fsdp cp tp`` and the expert axes ``pp edp ep etp`` are two views of the
    same ranks. Without ``world``, the number of ranks is the least that both products divide. Where a product is less
    than the number of ranks, ``dp`` takes the rest, and ``edp`` if there is an expert axis. The last axis of a view is
    the innermost: its ranks are neighbours. An axis of another name is a dense one.

    Args:
        sizes: sizes by name. The mapping holds these and no others.
        world: the number of ranks.

    Raises:
        CheckError: a size below 1, a product that does not divide ``world``, or more than 8 ranks.

    Example:
        >>> layout = Layout({"tp": 2, "ep": 4})
        >>> layout.world, layout.place(3)
        (4, {'dp': 1, 'tp': 1, 'ep': 3})
    """

    def __init__(self, sizes: Mapping[str, int] | None = None, world: int | None = None):
        super().__init__(sizes or {})
        for name, size in self.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise CheckError(f"layout {self}: {name} must be an integer of at least 1, got {size!r}")
        dense = {n: s for n, s in self.items() if n not in EXPERT or n == "pp"}
        expert = {n: s for n, s in self.items() if n in EXPERT}
        products = math.prod(dense.values()), math.prod(expert.values())
        self.world = math.lcm(*products) if world is None else world
        if not 1 <= self.world <= MAX_WORLD_SIZE:
            raise CheckError(f"layout {self}: takes {self.world} ranks; a check starts 1 to {MAX_WORLD_SIZE}")
        for product, sizes_of in zip(products, (dense, expert), strict=True):
            if self.world % product:
                said = " * ".join(sizes_of)
                raise CheckError(f"layout {self}: {said} = {product} must divide the number of ranks, {self.world}")
        others = sorted(dense.keys() - set(DENSE))
        order = (*DENSE[:-1], *others, DENSE[-1])
        self.views = (
            _view(dense, order, "dp", self.world, self),
            # Without an expert axis there is nothing to see from that side.
            _view(expert, EXPERT, "edp", self.world, self) if expert.keys() - {"pp"} else {},
        )

    def place(self, rank: int) -> dict[str, int]:
        """The coordinate of a rank on each axis of more than one rank."""
        found = {}
        for view in self.views:
            rest = rank
            here = {}
            for name, size in reversed(view.items()):
                here[name], rest = rest % size, rest // size
            found |= {n: here[n] for n in view if view[n] > 1}
        return found

    def rows(self, rank: int, count: int) -> slice:
        """Which of ``count`` sequences a rank holds: equal parts, one for each place on the data-parallel axes."""
        sizes = {n: s for n, s in self.views[0].items() if n in DATA}
        place, number = self.place(rank), 0
        for name, size in sizes.items():
            number = number * size + place.get(name, 0)
        parts = math.prod(sizes.values())
        return slice(number * count // parts, (number + 1) * count // parts)

    def groups(self) -> dict[str, list[list[int]]]:
        """The ranks joined by every set of axes of a view, by the names of those axes, small groups first."""
        found: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        for names in self._sets_of_axes():
            fixed: dict[tuple[int, ...], list[int]] = {}
            for rank in range(self.world):
                place = self.place(rank)
                view = next(v for v in self.views if set(names) <= v.keys())
                fixed.setdefault(tuple(place.get(n, 0) for n in view if n not in names), []).append(rank)
            key = tuple(map(tuple, fixed.values()))
            found.setdefault(key, []).append(" x ".join(names))
        ordered = sorted(found.items(), key=lambda item: len(item[0][0]))
        return {" or ".join(names): [list(g) for g in groups] for groups, names in ordered}

    def factors(self) -> dict[str, int]:
        """Sizes of every set of axes, by their names; the world size is there too."""
        found = {}
        for names in self._sets_of_axes():
            view = next(v for v in self.views if set(names) <= v.keys())
            found[" x ".join(names)] = math.prod(view[n] for n in names)
        if self.world > 1 and self.world not in found.values():
            found["the world size"] = self.world
        return found

    def _sets_of_axes(self) -> Iterator[tuple[str, ...]]:
        said = set()
        for count in range(1, 5):
            for view in self.views:
                axes = [n for n, size in view.items() if size > 1]
                for names in combinations(axes, count):
                    if names not in said:
                        said.add(names)
                        yield names

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.items()) or "one process"


def _view(sizes: dict[str, int], order: tuple[str, ...], rest: str, world: int, layout: Layout) -> dict[str, int]:
    left = world // math.prod(sizes.values())
    if left > 1 and rest in sizes:
        raise CheckError(
            f"layout {layout}: {' * '.join(sizes)} = {world // left}, and there are {world} ranks; leave {rest} out to "
            "have it worked out, or give the axis that is missing"
        )
    sizes = sizes | ({rest: left} if left > 1 else {})
    return {name: sizes[name] for name in order if name in sizes}


def parse_layouts(text: str, world: int | None = None) -> list[Layout]:
    """Layouts from a text such as ``"tp=2,ep=2 ; ep=4,etp=1"``.

    Raises:
        CheckError: something that is not ``name=size``, or no legal layout.
    """
    layouts = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        sizes = {}
        for pair in filter(None, (p.strip() for p in part.split(","))):
            name, equals, size = (piece.strip() for piece in pair.partition("="))
            if not equals or not name.isidentifier() or not size.isdecimal():
                raise CheckError(f"layouts {text!r}: expected axis=size, such as tp=2,ep=2 ; ep=4, got {pair!r}")
            sizes[name] = int(size)
        own = sizes.pop("world", world)
        layouts.append(Layout(sizes, own))
    if not layouts:
        raise CheckError(f"layouts {text!r}: there is none; expected axis=size, such as tp=2,ep=2 ; ep=4")
    return layouts
