"""Plans as a table for readers, and as JSON."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.table import Table

from moesaic.plan.choice import Job
from moesaic.plan.search import Plan

_GB = 1e9


def record(plan: Plan, job: Job) -> dict[str, Any]:
    """All that is known of a plan, in plain numbers: bytes and seconds."""
    layout, choice = plan.choice.layout, plan.choice
    sent: dict[str, dict[str, Any]] = defaultdict(lambda: {"calls": 0, "bytes": 0.0, "across_nodes": 0.0})
    for collective in plan.cost.collectives:
        entry = sent[f"{collective.of}: {collective.kind}"]
        entry["calls"] += collective.calls
        entry["bytes"] += collective.sent
        entry["across_nodes"] += collective.across
    within, across = link_bytes(plan)
    return {
        "layout": {"pp": layout.pp, **layout.of_view("dense"), **layout.of_view("expert")},
        "sequences_a_pass": choice.sequences,
        "passes": choice.passes(job),
        "recompute": choice.recompute,
        "memory": {**plan.memory._asdict(), "total": plan.memory.total},
        "bytes": {"within_node": within, "across_nodes": across},
        "collectives": dict(sent),
        "seconds": {**plan.cost.time._asdict(), "total": plan.cost.time.total},
        "tokens_a_second": job.batch * job.seq_len / plan.cost.time.total,
        "mfu": plan.mfu,
    }


def link_bytes(plan: Plan) -> tuple[float, float]:
    """Bytes that a rank sends in a step, to ranks of its node, and to others."""
    across = sum(collective.across for collective in plan.cost.collectives)
    return sum(collective.sent for collective in plan.cost.collectives) - across, across


def tables(plans: list[Plan], job: Job) -> list[Table]:
    """What is chosen and how fast it is; and what a rank holds and sends."""
    fast = Table(title="the fastest that fit")
    for name in ("", "pp", "dp", "cp", "tp", "edp", "ep", "etp", "seqs x passes", "recompute"):
        fast.add_column(name, justify="right")
    for name in ("step s", "compute", "exchange", "FSDP", "bubble", "tokens/s", "MFU"):
        fast.add_column(name, justify="right")
    held = Table(title="of one rank: GB at the fullest moment, GB sent in a step, collectives")
    for name in ("", "memory", "weights", "gradients", "optimizer", "kept", "gathered", "working", "dispatch"):
        held.add_column(name, justify="right")
    for name in ("in node", "across", "calls"):
        held.add_column(name, justify="right")
    for number, plan in enumerate(plans, start=1):
        layout, time, memory = plan.choice.layout, plan.cost.time, plan.memory
        dp = f"{layout.dp_replicate}x{layout.dp_shard}" if layout.dp_replicate > 1 else str(layout.dp_shard)
        sizes = [layout.pp, dp, layout.cp, layout.tp, layout.edp, layout.ep, layout.etp]
        parts = (time.total, time.compute, time.exchange, time.fsdp, time.bubble)
        fast.add_row(
            str(number),
            *map(str, sizes),
            f"{plan.choice.sequences} x {plan.choice.passes(job)}",
            plan.choice.recompute,
            *(f"{seconds:.3g}" for seconds in parts),
            f"{job.batch * job.seq_len / time.total:,.0f}",
            f"{100 * plan.mfu:.1f}%",
        )
        amounts = (memory.total, *memory)
        held.add_row(
            str(number),
            *(f"{size / _GB:.2f}" for size in amounts),
            *(f"{size / _GB:.2f}" for size in link_bytes(plan)),
            str(sum(collective.calls for collective in plan.cost.collectives)),
        )
    return [fast, held]
