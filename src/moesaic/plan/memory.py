"""What a rank holds when it holds the most, in a step after the first.

Weights, gradients and optimizer states are exact. What layers keep and need comes from a rehearsal. When the most is
held is found by walking through the backward pass: what is kept gets less there, and gradients get more.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from moesaic.parallel.mesh import MeshLayout
from moesaic.plan.choice import Choice, Job
from moesaic.plan.load import load_of
from moesaic.plan.model import Layer, Shapes, Weight, dense_ranks
from moesaic.plan.rehearsal import OfLayer, Rehearsal
from moesaic.plan.stages import Stage, different_stages

# AdamW: two averages of each weight, in its dtype.
OPTIMIZER_STATES = 2


class Memory(NamedTuple):
    """Bytes of one rank at the moment when it holds the most, by what they are for.

    Attributes:
        weights, gradients, optimizer: of this rank's shards, as long as there is a step.
        activations: kept for backward passes that have not run yet.
        gathered: weights and gradients of other ranks' shards, while FSDP has them here.
        working: what the layer that runs needs besides, buffers of its dispatch among it.
        dispatch: the part of these that is rows of tokens on their way to experts and back, of one layer.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    working: int
    dispatch: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.working


@cache
def shard_of_stage(stage: Stage, layout: MeshLayout) -> int:
    """What a rank keeps of the weights of a stage."""
    layers = sum(count * sharded_bytes((*kind.dense, *kind.experts), layout) for kind, count in stage.kinds)
    return layers + sharded_bytes(stage.first + stage.last, layout)


@cache
def gradients_of_stage(stage: Stage, layout: MeshLayout) -> int:
    """Bytes of the gradients of a rank's weights before FSDP cuts them."""
    layers = sum(count * _whole((*kind.dense, *kind.experts), layout) for kind, count in stage.kinds)
    return layers + _whole(stage.first + stage.last, layout)


def _whole(weights: Iterable[Weight], layout: MeshLayout) -> int:
    return sum(weight.local_numel(layout) * weight.itemsize for weight in weights)


@cache
def sharded_bytes(weights: tuple[Weight, ...], layout: MeshLayout) -> int:
    """What a rank keeps of weights, its part of FSDP's padding included."""
    return sum(weight.sharded_numel(layout) * weight.itemsize for weight in weights)


def whole_bytes(weights: Iterable[Weight], layout: MeshLayout) -> int:
    """What a rank has of weights while FSDP has gathered them: nothing more where there is no FSDP."""
    return sum(w.local_numel(layout) * w.itemsize for w in weights if has_fsdp(w, layout))


def has_fsdp(weight: Weight, layout: MeshLayout) -> bool:
    """Whether FSDP manages a weight, perhaps without cutting it: where copies of it meet different tokens."""
    ranks = layout.edp if weight.of_experts else dense_ranks(layout) * layout.dp_replicate
    return ranks > 1


def memory_of(shapes: Shapes, choice: Choice, job: Job, rehearsed: Rehearsal) -> Memory:
    """The most that a rank of any stage holds."""
    of_kind = dict(zip(shapes.kinds, rehearsed.layers, strict=True))
    every = different_stages(shapes, choice.layout)
    found = (_of_stage(stage, choice, job, rehearsed, of_kind) for stage in every if stage.layers)
    return max(found, key=lambda memory: memory.total)


def _of_stage(stage: Stage, choice: Choice, job: Job, rehearsed: Rehearsal, of_kind: dict[Layer, OfLayer]) -> Memory:
    layout, outer = choice.layout, stage.first + stage.last
    weights = shard_of_stage(stage, layout)
    optimizer = OPTIMIZER_STATES * weights
    # Of one-forward-one-backward, a stage has as many passes in flight as there are stages from it on.
    in_flight = min(layout.pp - stage.index, choice.passes(job))
    before = rehearsed.before if stage.index == 0 else 0
    kept = [of_kind[layer].input if choice.recompute == "full" else of_kind[layer].kept for layer in stage.layers]
    others = (in_flight - 1) * (before + sum(kept))
    # Passes before the last leave whole gradients, which are sent once.
    gradients_before = gradients_of_stage(stage, layout) if choice.passes(job) > 1 else 0

    moments: list[Memory] = []
    rows = max((_rows(layer, choice, job) for layer in stage.layers), default=0)
    root = whole_bytes(outer, layout)
    first, last = whole_bytes(stage.first, layout), whole_bytes(stage.last, layout)
    is_last = bool(stage.last)

    def moment(gradients: int, activations: int, gathered: int, working: int) -> None:
        moments.append(Memory(weights, gradients, optimizer, activations, gathered, working, rows))

    # The loss.
    if is_last:
        live = others + before + sum(kept)
        top = stage.layers[-1]
        moment(gradients_before, live, root + _flat(top, layout), rehearsed.after_forward)
        moment(gradients_before, live, root + whole_bytes(top.dense, layout), rehearsed.after_backward)
    after_head = last if is_last else 0
    # Without FSDP the head's gradient is there first; with it, it is among what is gathered.
    done = [weight for weight in stage.last if not has_fsdp(weight, layout)]
    for i in reversed(range(len(stage.layers))):
        layer = stage.layers[i]
        of = of_kind[layer]
        live = others + before + sum(kept[: i + 1])
        extra = of.backward + rehearsed.gradient
        if choice.recompute == "full":
            extra = of.kept - of.input + max(of.forward, of.backward) + rehearsed.gradient
        gathered = root + after_head + _gathered(layer, layout)
        if layout.pp > 1:
            # torch's schedules keep what backward passes have gathered.
            gathered += whole_bytes((w for w in done if w not in stage.last), layout)
        gradients = max(gradients_before, sharded_bytes(tuple(done), layout))
        moment(gradients, live, gathered, extra)
        done += [*layer.dense, *layer.experts]
    # FSDP's reduction of what is in no layer comes last.
    moment(weights, others + before, root + first + after_head + first + last, 0)
    # The optimizer is fused, and needs nothing beside.
    moment(weights, 0, root, 0)
    return max(moments, key=lambda m: m.total)


def _gathered(layer: Layer, layout: MeshLayout) -> int:
    """What FSDP has here in the backward pass of a layer: its weights, and of its neighbours' dense part the weights
    that come next, and the gradients that are being reduced. Gradients of its own are in what the layer needs.
    """
    dense = whole_bytes(layer.dense, layout)
    return whole_bytes(layer.experts, layout) + 3 * dense


def _flat(layer: Layer, layout: MeshLayout) -> int:
    """What FSDP gathered last in a layer's forward pass: it stays until something else is gathered."""
    return whole_bytes(layer.experts, layout) or whole_bytes(layer.dense, layout)


def _rows(layer: Layer, choice: Choice, job: Job) -> int:
    """Bytes of rows that a layer sends and has received."""
    layout = choice.layout
    if layer.moe is None or layout.ep * layout.etp == 1:
        return 0
    load = load_of(choice.tokens(job), layer.moe, layout, job.capacity)
    itemsize = 2 if job.autocast else layer.experts[0].itemsize
    return (load.sent + load.gathered) * layer.moe.dim * itemsize
