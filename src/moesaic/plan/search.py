"""Which ways to train there are, and which of those that fit are the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from moesaic.ops.arguments import divisors
from moesaic.parallel.fit import expert_misfit
from moesaic.parallel.mesh import MeshLayout, resolve_layout
from moesaic.parallel.recompute import Recompute
from moesaic.plan.choice import Choice, Job
from moesaic.plan.hardware import Hardware
from moesaic.plan.memory import OPTIMIZER_STATES, Memory, gradients_of_stage, memory_of, shard_of_stage
from moesaic.plan.model import Planned, Shapes, problem
from moesaic.plan.rehearsal import Rehearsal, rehearse
from moesaic.plan.stages import different_stages, stages
from moesaic.plan.time import Cost, cost_of, mfu

# More sequences in a forward pass than this fill no device better.
_MOST_SEQUENCES = 8
# So many shapes of a rank are rehearsed at most, each in about a second.
_REHEARSALS = 40


@dataclass(frozen=True)
class Machines:
    """What there is to compute on.

    Attributes:
        gpus: devices in all, one a rank.
        per_node: devices of a node.
        memory: bytes of a device.
        hardware: what they can do.
        dtype: what layers compute in, ``"bf16"`` or ``"fp32"``.
    """

    gpus: int
    per_node: int
    memory: float
    hardware: Hardware
    dtype: str


class Plan(NamedTuple):
    """A choice, and what it costs."""

    choice: Choice
    cost: Cost
    memory: Memory
    mfu: float


class Found(NamedTuple):
    """The result of a search.

    Attributes:
        plans: those that fit, the fastest first.
        tried: how many legal choices there are.
        nearest: where none fits, the one that needs the least memory.
    """

    plans: list[Plan]
    tried: int
    nearest: Plan | None


def layouts(shapes: Shapes, planned: Planned, job: Job, gpus: int, per_node: int) -> Iterator[MeshLayout]:
    """All legal layouts of so many ranks whose tp and etp stay within a node.

    A dp rank has whole sequences, a tp rank whole heads, a stage at least a layer, and every rank experts where FSDP
    needs them: what ``resolve_layout`` and ``parallelize`` check.
    """
    configs = {layer.moe for layer in shapes.layers if layer.moe is not None}
    legal_tp = [n for n in divisors(gpus) if n <= per_node and problem(planned, tp=n) is None]
    legal_cp = [n for n in divisors(gpus) if n == 1 or problem(planned, cp=n) is None]
    for pp in divisors(gpus):
        if pp > len(shapes.layers):
            continue
        stage = gpus // pp
        expert_views = [(ep, etp) for etp in divisors(stage) if etp <= per_node for ep in divisors(stage // etp)]
        for tp in (n for n in legal_tp if stage % n == 0):
            for cp in (n for n in legal_cp if stage // tp % n == 0):
                if job.seq_len < 2 * cp * tp:
                    continue
                dp = stage // tp // cp
                if job.batch % dp:
                    continue
                # Weights are cut over all ranks that may, or over those of a node, and nodes have copies.
                inside = max(1, per_node // (tp * cp))
                for dp_replicate in {1, dp // inside if dp % inside == 0 else 1}:
                    for ep, etp in expert_views:
                        layout = resolve_layout(gpus, pp=pp, tp=tp, cp=cp, ep=ep, etp=etp, dp_replicate=dp_replicate)
                        if not any(expert_misfit(c.num_experts, c.hidden_dim, c.dim, layout) for c in configs):
                            yield layout


def choices(shapes: Shapes, planned: Planned, job: Job, gpus: int, per_node: int) -> Iterator[Choice]:
    """All ways: layouts, sequences of a pass, and what is computed again."""
    for layout in layouts(shapes, planned, job, gpus, per_node):
        of_rank = job.batch // layout.dp_size
        for sequences in divisors(of_rank):
            if sequences & (sequences - 1) or sequences > _MOST_SEQUENCES:
                continue
            if layout.pp > 1 and of_rank // sequences < layout.pp:
                continue  # more stages than passes: most of them would wait
            for recompute in get_args(Recompute):
                yield Choice(layout, sequences, recompute)


def search(planned: Planned, job: Job, machines: Machines, top: int = 10) -> Found:
    """The ``top`` fastest ways that fit into memory.

    Times come first, for they cost little to work out. Then what fits is looked for, the fastest first.
    """
    shapes = planned.shapes
    fitting: list[tuple[float, Choice]] = []
    too_large: list[Choice] = []
    for choice in choices(shapes, planned, job, machines.gpus, machines.per_node):
        if _states(shapes, choice.layout) + _held(shapes, choice, job) > machines.memory:
            too_large.append(choice)
        else:
            fitting.append((_cost(shapes, choice, job, machines).time.total, choice))
    fitting.sort(key=lambda pair: pair[0])
    known: dict[tuple[object, ...], Rehearsal] = {}
    plans: list[Plan] = []
    nearest: Plan | None = None
    for _, choice in fitting:
        if len(plans) == top:
            break
        plan = _plan(planned, choice, job, machines, known)
        if plan is not None and plan.memory.total <= machines.memory:
            plans.append(plan)
    if not plans:
        everything = [choice for _, choice in fitting] + too_large
        everything.sort(key=lambda choice: _need(shapes, choice, job))
        known.clear()
        found = (_plan(planned, choice, job, machines, known) for choice in everything[:5])
        nearest = min((p for p in found if p is not None), key=lambda p: p.memory.total, default=None)
    return Found(plans, len(fitting) + len(too_large), nearest)


def plan_of(planned: Planned, choice: Choice, job: Job, machines: Machines) -> Plan:
    """What one choice costs."""
    plan = _plan(planned, choice, job, machines, {})
    assert plan is not None
    return plan


def _plan(
    planned: Planned, choice: Choice, job: Job, machines: Machines, known: dict[tuple[object, ...], Rehearsal]
) -> Plan | None:
    """None where enough has been rehearsed."""
    one, two = (_rehearsed(planned, replace(choice, sequences=n), job, known) for n in (1, 2))
    if one is None or two is None:
        return None
    shapes = planned.shapes
    memory = memory_of(shapes, choice, job, one.extended(two, choice.sequences))
    cost = _cost(shapes, choice, job, machines)
    used = mfu(shapes, job, cost.time.total, machines.hardware, machines.dtype, machines.gpus)
    return Plan(choice, cost, memory, used)


def _rehearsed(
    planned: Planned, choice: Choice, job: Job, known: dict[tuple[object, ...], Rehearsal]
) -> Rehearsal | None:
    """None where there have been enough."""
    key = _key(choice)
    if key not in known and len(known) < _REHEARSALS:
        known[key] = rehearse(planned, choice, job)
    return known.get(key)


def _cost(shapes: Shapes, choice: Choice, job: Job, machines: Machines) -> Cost:
    return cost_of(shapes, choice, job, machines.hardware, machines.dtype, machines.per_node)


def _held(shapes: Shapes, choice: Choice, job: Job) -> int:
    """Whole gradients of the first stage, between the passes of a step."""
    stage = stages(shapes, choice.layout.pp)[0]
    return gradients_of_stage(stage, choice.layout) if choice.passes(job) > 1 else 0


def _states(shapes: Shapes, layout: MeshLayout) -> int:
    """Weights and optimizer states of the stage with the most."""
    return (1 + OPTIMIZER_STATES) * max(shard_of_stage(stage, layout) for stage in different_stages(shapes, layout))


def _need(shapes: Shapes, choice: Choice, job: Job) -> float:
    """What a choice needs in about, to see which needs the least."""
    kept = {"none": 30, "experts": 20, "selective": 14, "full": 2}[choice.recompute]
    activations = choice.tokens(job) * shapes.dim * kept * len(shapes.layers) / choice.layout.pp
    return _states(shapes, choice.layout) + _held(shapes, choice, job) + activations


def _key(choice: Choice) -> tuple[object, ...]:
    """What a rank's shapes depend on."""
    layout, again = choice.layout, choice.recompute if choice.recompute in ("experts", "selective") else None
    return layout.tp, layout.cp, layout.ep, layout.etp, choice.sequences, again
