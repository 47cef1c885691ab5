"""How a pipeline cuts a model: which layers a stage has."""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.split import layers_of_stages
from moesaic.plan.model import Layer, Shapes, Weight


class Stage(NamedTuple):
    """The part of a model that the ranks of one stage have.

    Attributes:
        index: the first is 0.
        layers: in order.
        kinds: how many there are of each kind.
        first: the weights before all layers, in the first stage.
        last: those after all layers, in the last. A head that is tied to the embedding is in both.
    """

    index: int
    layers: tuple[Layer, ...]
    kinds: tuple[tuple[Layer, int], ...]
    first: tuple[Weight, ...]
    last: tuple[Weight, ...]

    @property
    def weights(self) -> Iterable[Weight]:
        yield from self.first
        for layer in self.layers:
            yield from layer.dense
            yield from layer.experts
        yield from self.last


@cache
def different_stages(shapes: Shapes, layout: MeshLayout) -> tuple[Stage, ...]:
    """Those of a layout that need a look: one in the middle stands for all others with as many layers."""
    every = stages(shapes, layout.pp)
    seen = {(stage.kinds, stage.first, stage.last): stage for stage in reversed(every)}
    return tuple(seen.values())


@cache
def stages(shapes: Shapes, count: int) -> tuple[Stage, ...]:
    """All stages of a pipeline of so many; one that has everything where there is no pipeline."""
    embedding, *others = shapes.outer
    found = []
    for i, numbers in enumerate(layers_of_stages(len(shapes.layers), count)):
        first = (embedding,) if i == 0 else ()
        last = tuple(others) if i == count - 1 else ()
        if shapes.tied and i == count - 1 and count > 1:
            last = (embedding, *last)
        layers = tuple(shapes.layers[n] for n in numbers)
        found.append(Stage(i, layers, tuple(Counter(layers).items()), first, last))
    return tuple(found)
