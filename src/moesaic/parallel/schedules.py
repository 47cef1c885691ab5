"""The schedules of torch.distributed.pipelining by name, and what each asks for."""

from __future__ import annotations

from typing import NamedTuple

from moesaic.parallel.mesh import MeshLayout


class Schedule(NamedTuple):
    """A schedule.

    Attributes:
        name: of the class in torch.distributed.pipelining.
        stages_per_rank: how many stages a rank has where nothing is said: exactly 1 with 1.
        is_v: stages go to the ranks up and then down again, 2 on each. Else they go round and round.
        splits_backward: the gradients of weights are made apart from those of inputs, and later.
    """

    name: str
    stages_per_rank: int
    is_v: bool = False
    splits_backward: bool = False

    def rank_of(self, stage: int, pp: int) -> int:
        """Which rank along pp has a stage."""
        turn, place = divmod(stage, pp)
        return pp - 1 - place if self.is_v and turn % 2 else place


SCHEDULES = {
    "gpipe": Schedule("ScheduleGPipe", 1),
    "1f1b": Schedule("Schedule1F1B", 1),
    "interleaved": Schedule("ScheduleInterleaved1F1B", 2),
    "zero-bubble": Schedule("ScheduleInterleavedZeroBubble", 2, splits_backward=True),
    "zbv": Schedule("ScheduleZBVZeroBubble", 2, is_v=True, splits_backward=True),
}


def check_schedule(
    name: str, layout: MeshLayout, stages_per_rank: int | None = None, microbatches: int | None = None
) -> None:
    """Raise ``ValueError`` unless a schedule can run over these ranks, with so many stages and microbatches."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule: got {name!r}; choose one of {', '.join(map(repr, SCHEDULES))}")
    schedule, pp = SCHEDULES[name], layout.pp
    if stages_per_rank is not None:
        only = "2" if schedule.is_v else "1" if schedule.stages_per_rank == 1 else "2 or more"
        if stages_per_rank != schedule.stages_per_rank and (only != "2 or more" or stages_per_rank < 2):
            others = [other for other, s in SCHEDULES.items() if s.stages_per_rank != schedule.stages_per_rank]
            raise ValueError(
                f"stages_per_rank: {name!r} has {only} on each rank, got {stages_per_rank}; leave it out, or choose "
                f"the schedule {' or '.join(map(repr, others))}"
            )
    # FSDP is over these.
    sharded = {axis: getattr(layout, axis) for axis in ("dp_replicate", "dp_shard", "cp", "edp")}
    if schedule.splits_backward and (axes := [f"{axis} {size}" for axis, size in sharded.items() if size > 1]):
        raise ValueError(
            f"schedule: {name!r} makes gradients of weights apart, and torch then loses those of FSDP modules inside "
            f"others, which parallelize makes for {', '.join(axes)}; choose 'interleaved', or tp, ep and etp so that "
            "each of these is 1"
        )
    if microbatches is None:
        return
    if microbatches < 1:
        raise ValueError(f"microbatches: must be at least 1, got {microbatches}")
    if name == "1f1b" and microbatches < pp:
        raise ValueError(
            f"microbatches: '1f1b' needs at least as many as stages, {pp}, got {microbatches}; give more, or choose "
            "the schedule 'gpipe'"
        )
    rounds = max(1, microbatches // pp)
    if schedule.stages_per_rank > 1 and not schedule.is_v and microbatches % rounds:
        legal = [n for n in range(1, microbatches + 2 * pp) if n % max(1, n // pp) == 0]
        nearest = sorted(sorted(legal, key=lambda n: abs(n - microbatches))[:2])
        raise ValueError(
            f"microbatches: {name!r} over {pp} ranks takes them in rounds of equal size, which {microbatches} do not "
            f"make; choose {' or '.join(map(str, nearest))}"
        )
