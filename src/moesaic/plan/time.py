"""How long a step takes: arithmetic, memory traffic, and communication that nothing hides.

A roofline: each part takes as long as the slower of its arithmetic and its memory traffic. FSDP's collectives run
beside the computation, and only what is longer than it shows, as far as the hardware can do both at once; everything
else is waited for.
"""

from __future__ import annotations

from typing import NamedTuple

from moesaic.parallel.recompute import Recompute
from moesaic.plan.choice import Choice, Job
from moesaic.plan.hardware import Hardware
from moesaic.plan.load import load_of
from moesaic.plan.memory import OPTIMIZER_STATES, gradients_of_stage, shard_of_stage
from moesaic.plan.model import Layer, Shapes
from moesaic.plan.stages import Stage, different_stages
from moesaic.plan.traffic import Collective, collectives_of

# What is computed again, as a part of a forward pass: dense products, the operators between them, experts. Of experts
# two of three products are for hidden rows.
_AGAIN: dict[Recompute, tuple[float, float, float]] = {
    "none": (0, 0, 0),
    "experts": (0, 0, 2 / 3),
    "selective": (0, 1, 1),
    "full": (1, 1, 1),
}


class Time(NamedTuple):
    """Seconds of a step of the slowest stage.

    Attributes:
        compute: of products and of what else layers do, forward, backward and again.
        exchange: of collectives that are waited for.
        fsdp: of FSDP's collectives, as far as the computation beside them does not hide them.
        bubble: in which a pipeline fills and empties.
        optimizer: of its step.
    """

    compute: float
    exchange: float
    fsdp: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


class Cost(NamedTuple):
    """What a step of a choice takes and sends, of the slowest stage."""

    time: Time
    collectives: tuple[Collective, ...]


def cost_of(shapes: Shapes, choice: Choice, job: Job, hardware: Hardware, dtype: str, per_node: int) -> Cost:
    """``dtype`` is what layers compute in: ``"bf16"`` or ``"fp32"``."""
    found = [
        _of_stage(shapes, stage, choice, job, hardware, dtype, per_node)
        for stage in different_stages(shapes, choice.layout)
    ]
    return max(found, key=lambda cost: cost.time.total)


def mfu(shapes: Shapes, job: Job, seconds: float, hardware: Hardware, dtype: str, world_size: int) -> float:
    """The part of the devices' arithmetic that the model itself needs; what is computed again does not count."""
    return shapes.flops(job.seq_len) * job.batch * job.seq_len / seconds / (hardware.flops[dtype] * world_size)


def _of_stage(
    shapes: Shapes, stage: Stage, choice: Choice, job: Job, hardware: Hardware, dtype: str, per_node: int
) -> Cost:
    itemsize = 2 if dtype == "bf16" else 4
    passes, layout = choice.passes(job), choice.layout
    again_of, compute, host = _AGAIN[choice.recompute], 0.0, 0.0
    for layer, count in stage.kinds:
        # A backward pass is two forward passes.
        for seconds, again in zip(_forward(layer, choice, job, hardware, dtype, itemsize), again_of, strict=True):
            compute += count * (3 + again) * seconds
        host += count * (3 + again_of[1]) * hardware.layer
    if stage.last:
        head = shapes.vocab * choice.tokens(job)
        compute += 3 * hardware.matmul_seconds(2 * head * shapes.dim, dtype) + hardware.memory_seconds(20 * head)
    compute = passes * hardware.beside(compute, host)
    # Each pass but the first adds its gradients to those that are there: two are read and one is written.
    compute += (passes - 1) * hardware.memory_seconds(3 * gradients_of_stage(stage, layout))
    found = tuple(collectives_of(stage, choice, job, shapes.dim, itemsize, per_node))
    beside = ("FSDP", "replicas")
    exchange = sum(_seconds(c, hardware) for c in found if c.of not in beside)
    fsdp = sum(_seconds(c, hardware) + _copied(c, hardware) for c in found if c.of in beside)
    fsdp = hardware.beside(fsdp, compute) - compute
    weights = shard_of_stage(stage, layout)
    # Weights and states are read and written, gradients read.
    optimizer = hardware.memory_seconds(weights * (2 * (1 + OPTIMIZER_STATES) + 1))
    bubble = pipeline_bubble(layout.pp, hardware.alone) * (compute + exchange) / passes
    return Cost(Time(compute, exchange, fsdp, bubble, optimizer), found)


def pipeline_bubble(stages: int, alone: float) -> float:
    """How many passes longer a pipeline takes because it fills and empties.

    While ``k`` of its stages have something to do, these are ``min(alone, stages / k)`` times as fast as all together.
    """
    filling = sum((1 / min(alone, stages / k) for k in range(1, stages)), 0.0)
    return max(2 * filling - (stages - 1), 0.0)


def _forward(
    layer: Layer, choice: Choice, job: Job, hardware: Hardware, dtype: str, itemsize: int
) -> tuple[float, float, float]:
    """Seconds of a forward pass of a layer: of its dense products, of what is between them, and of its experts."""
    layout, tokens, of = choice.layout, choice.tokens(job), layer.attention
    matrices = sum(w.numel for w in layer.dense if len(w.shape) > 1)
    products = hardware.matmul_seconds(2 * tokens * matrices + tokens * of.causal_flops(job.seq_len), dtype)
    # Norms, rotation, residuals: what they read and write, for each token.
    width = of.heads * of.key_dim + of.key_heads * (of.key_dim + of.value_dim)
    dim = layer.dense[-1].shape[-1]
    between = hardware.memory_seconds(tokens * (16 * dim + 8 * width) * itemsize)
    if layer.moe is None:
        return products, between, 0.0
    load, moe = load_of(tokens, layer.moe, layout, job.capacity), layer.moe
    hidden, matrices = -(-moe.hidden_dim // layout.etp), 3 if moe.gated else 2
    flops = 2 * load.copies * matrices * moe.dim * hidden
    read = load.experts * matrices * moe.dim * hidden
    moved = load.copies * (3 * moe.dim + 5 * hidden) + 4 * load.gathered * moe.dim
    arithmetic = hardware.grouped_seconds(flops, dtype, load.rows_an_expert)
    weights, rows = hardware.memory_seconds(read * itemsize), hardware.memory_seconds(moved * itemsize)
    return products, between, max(arithmetic, weights) + rows


def _seconds(collective: Collective, hardware: Hardware) -> float:
    if collective.group.size == 1:
        return 0.0
    leaves = collective.group.near < collective.group.size
    inside = collective.sent if collective.kind not in ("all-to-all", "send") else collective.sent - collective.across
    latency = (hardware.network if leaves else hardware.node).latency
    slowest = max(inside / hardware.node.bandwidth, collective.across / hardware.network.bandwidth)
    return hardware.slower.get(collective.kind, 1.0) * slowest + collective.calls * latency


def _copied(collective: Collective, hardware: Hardware) -> float:
    """FSDP copies what it has gathered out of one buffer into weights, and gradients into one to be summed."""
    if collective.of != "FSDP":
        return 0.0
    size = collective.group.size
    return hardware.memory_seconds(2 * collective.sent * size / (size - 1))
