"""What a rank sends in a step: every collective, its bytes, and how many of them leave the node.

Exact where the routing is even, or has a capacity: tests count the same on ranks.

Legend: S rows sent over ep, M received, N gathered over etp, D model dim, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from moesaic.layers import MoEConfig
from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.nodes import WORTH
from moesaic.plan.choice import Choice, Job
from moesaic.plan.groups import Group, group_of
from moesaic.plan.load import Load, load_of, rows_away
from moesaic.plan.memory import has_fsdp, sharded_bytes
from moesaic.plan.model import Layer, Weight, data_ranks
from moesaic.plan.stages import Stage

Kind = Literal["all-to-all", "all-gather", "reduce-scatter", "all-reduce", "send"]
Of = Literal["dispatch", "tensor parallel", "context parallel", "FSDP", "replicas", "pipeline"]

# The weights of a token's experts travel in fp32, and their numbers in as many bits.
_ROUTING = 4
_COUNT = 8


class Collective(NamedTuple):
    """Equal collectives of one rank in one step.

    Attributes:
        of: what they are for.
        kind: how they send.
        group: over which ranks.
        calls: how many there are.
        sent: bytes that this rank sends to others, in all of them.
        across: the part of it that leaves the node; of a ring what its share is.
    """

    of: Of
    kind: Kind
    group: Group
    calls: int
    sent: float
    across: float


def collectives_of(
    stage: Stage, choice: Choice, job: Job, dim: int, itemsize: int, per_node: int
) -> Iterator[Collective]:
    """Those of the first rank of a stage, in a step, without what is a few bytes: counts of tokens, norms, losses."""
    layout, passes = choice.layout, choice.passes(job)
    # Under "selective" what experts were sent is kept, and sequences are gathered again.
    forwards = 2 if choice.recompute == "full" else 1
    of_sequence = 2 if choice.recompute in ("full", "selective") else 1

    def near(view: Literal["dense", "expert"] | None, *axes: str) -> Group:
        return group_of(layout, view, axes, per_node)

    for layer, count in stage.kinds:
        of_layer = (
            *_of_dispatch(layer, choice, job, forwards, passes, itemsize, near),
            *_of_attention(layer, choice, job, of_sequence, passes, dim, itemsize, near),
            *_of_fsdp(layer.dense, False, layout, passes, near),
            *_of_fsdp(layer.experts, False, layout, passes, near),
        )
        for found in of_layer:
            yield found._replace(calls=count * found.calls, sent=count * found.sent, across=count * found.across)
    yield from _of_fsdp(stage.first + stage.last, True, layout, passes, near)
    yield from _of_whole(stage.first + stage.last, layout, near)
    if layout.pp > 1:
        rows = choice.tokens(job) * dim * itemsize
        ends = (stage.index > 0) + (stage.index < layout.pp - 1)
        group = near(None, "pp")
        away = group.near == 1 or group.near < group.size
        sent = float(rows * ends * passes)
        yield Collective("pipeline", "send", group, ends * passes, sent, sent if away else 0.0)


_Near = Callable[..., Group]


def _of_dispatch(
    layer: Layer, choice: Choice, job: Job, forwards: int, passes: int, itemsize: int, near: _Near
) -> Iterator[Collective]:
    layout, moe = choice.layout, layer.moe
    if moe is None or layout.ep * layout.etp == 1:
        return
    load = load_of(choice.tokens(job), moe, layout, job.capacity)
    ep, etp, both = near("expert", "ep"), near("expert", "etp"), near("expert", "ep", "etp")
    if job.capacity is None:
        # Of rows and of copies for each rank, and in two hops of rows for each node.
        nodes = 0 if _two_hops(ep, moe, job) is None else ep.size // ep.near
        counts = (2 * layout.ep + nodes) * _COUNT * (both.size - 1)
        yield _gather("dispatch", both, forwards * passes, counts * forwards * passes)
    row, routing = moe.dim * itemsize, moe.top_k * _ROUTING
    # There: rows, and weights beside ids. Back: results. The backward pass is the same, without ids.
    out, back = (row + 2 * routing, row), (row, row + routing)
    calls, width = 3 * (forwards + 1) * passes, (forwards * sum(out) + sum(back)) * passes
    if layout.ep > 1:
        yield _over_ep(ep, choice.tokens(job), load, moe, job, calls, width)
    if layout.etp > 1:
        gathered, reduced = load.received * (etp.size - 1), load.gathered - load.received
        gathers, reduces = (2 * forwards + 1) * passes, (forwards + 2) * passes
        of_gathers = (forwards * out[0] + back[0]) * gathered * passes
        yield _gather_rows("dispatch", etp, gathers, of_gathers, even=job.capacity is not None)
        yield _direct("dispatch", etp, reduces, (forwards * out[1] + back[1]) * reduced * passes)


def _over_ep(ep: Group, tokens: int, load: Load, moe: MoEConfig, job: Job, calls: int, width: int) -> Collective:
    one_hop = _direct("dispatch", ep, calls, float(load.away * width))
    two = _two_hops(ep, moe, job)
    if two is None:
        return one_hop
    across, within = tokens * two * width, load.sent * (ep.near - 1) / ep.near * width
    return one_hop._replace(calls=2 * calls, sent=across + within, across=across)


def _two_hops(ep: Group, moe: MoEConfig, job: Job) -> float | None:
    """Rows that a token sends to other nodes, where there are two hops: as ``parallelize`` decides where torchrun says
    which ranks are on one node.
    """
    nodes = ep.size // ep.near
    if job.capacity is not None or nodes == 1 or ep.near == 1 or ep.size % ep.near:
        return None
    one, two = rows_away(nodes, ep.near, moe)
    return two if two <= WORTH * one else None


def _of_attention(
    layer: Layer, choice: Choice, job: Job, forwards: int, passes: int, dim: int, itemsize: int, near: _Near
) -> Iterator[Collective]:
    layout, tokens = choice.layout, choice.tokens(job)
    if layout.tp > 1:
        group = near("dense", "tp")
        # A gather and a reduce-scatter, both ways.
        calls = (forwards + 1) * passes
        sent = tokens * (layout.tp - 1) * dim * itemsize * calls
        yield _gather_rows("tensor parallel", group, calls, sent, even=-(-job.seq_len // layout.cp) % layout.tp == 0)
        yield _direct("tensor parallel", group, calls, sent)
        yield from _of_whole(layer.dense, layout, near)
    if layout.cp > 1:
        group, of = near("dense", "cp"), layer.attention
        width = -(-of.key_heads // layout.tp) * (of.key_dim + of.value_dim)
        sent = tokens * layout.tp * (layout.cp - 1) * width * itemsize
        even = job.seq_len % (2 * layout.cp) == 0
        yield _gather_rows("context parallel", group, forwards * passes, sent * forwards * passes, even=even)
        yield _direct("context parallel", group, passes, sent * passes)


def _of_whole(weights: tuple[Weight, ...], layout: MeshLayout, near: _Near) -> Iterator[Collective]:
    """Weights that tp does not cut meet other tokens on each of its ranks, so their gradients are summed over it."""
    if layout.tp > 1:
        whole = [w.numel * w.itemsize for w in weights if not w.cuts]
        yield _reduce("tensor parallel", near("dense", "tp"), len(whole), sum(whole))


def _of_fsdp(
    weights: tuple[Weight, ...], is_root: bool, layout: MeshLayout, passes: int, near: _Near
) -> Iterator[Collective]:
    if not weights or not has_fsdp(weights[0], layout):
        return
    ranks = data_ranks(weights[0], layout)
    part = sharded_bytes(weights, layout)
    if ranks > 1:
        group = near("expert", "edp") if weights[0].of_experts else near("dense", "dp_shard", "cp")
        # The root stays gathered until the pass ends. In a pipeline torch's schedules keep it for the whole step, and
        # what a backward pass has gathered until a forward pass lets go of it.
        of_root, of_layer = (1, passes + 1) if layout.pp > 1 else (passes, 2 * passes)
        gathers = of_root if is_root else of_layer
        sent = part * (ranks - 1)
        yield _ring("FSDP", "all-gather", group, gathers, sent * gathers)
        yield _ring("FSDP", "reduce-scatter", group, 1, sent)
    if not weights[0].of_experts and layout.dp_replicate > 1:
        yield _reduce("replicas", near("dense", "dp_replicate"), 1, part)


def _direct(of: Of, group: Group, calls: int, sent: int | float) -> Collective:
    """Each rank sends to each other what is for it."""
    return Collective(of, "all-to-all", group, calls, sent, sent * (group.size - group.near) / (group.size - 1))


def _gather_rows(of: Of, group: Group, calls: int, sent: int | float, *, even: bool) -> Collective:
    """As :func:`moesaic.parallel.collectives.all_gather_rows`."""
    if even and group.size > 2:
        return _gather(of, group, calls, sent)
    return _direct(of, group, calls * (group.size - 1), sent)


def _gather(of: Of, group: Group, calls: int, sent: int | float) -> Collective:
    return _direct(of, group, calls, sent)._replace(kind="all-gather")


def _ring(of: Of, kind: Kind, group: Group, calls: int, sent: int | float) -> Collective:
    """Around a ring that enters and leaves each node once; its ranks share the way out."""
    return Collective(of, kind, group, calls, sent, 0.0 if group.near == group.size else sent / group.near)


def _reduce(of: Of, group: Group, calls: int, size: int | float) -> Collective:
    return _ring(of, "all-reduce", group, calls, 2 * size * (group.size - 1) / group.size)
