"""What there is to choose for a run: a layout, how many sequences a forward pass takes, and what is computed again."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.recompute import Recompute


@dataclass(frozen=True)
class Job:
    """What is to be trained, whatever the layout.

    Attributes:
        seq_len: tokens of a sequence.
        batch: sequences of a step, of all ranks together.
        autocast: compute in bf16 with weights of another dtype.
        capacity: as in ``parallelize``.
    """

    seq_len: int
    batch: int
    autocast: bool = False
    capacity: int | None = None


@dataclass(frozen=True)
class Choice:
    """One way to train it.

    Attributes:
        layout: sizes of all axes.
        sequences: of a forward pass of one dp rank.
        recompute: what is computed again in the backward pass, as in ``parallelize``.
    """

    layout: MeshLayout
    sequences: int
    recompute: Recompute

    def passes(self, job: Job) -> int:
        """Forward passes of a rank in a step: micro-batches, of a pipeline or accumulated."""
        return job.batch // self.layout.dp_size // self.sequences

    def tokens(self, job: Job) -> int:
        """Of a rank in a forward pass: its part of the sequences."""
        return self.sequences * -(-job.seq_len // self.layout.sequence_parts)

    def __str__(self) -> str:
        again = "" if self.recompute == "none" else f", recompute {self.recompute}"
        return f"{self.layout}, {self.sequences} sequence{'s'[: self.sequences != 1]} a pass{again}"
