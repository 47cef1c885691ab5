"""What a comparison looks at: one layout's ranks beside the one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moesaic.testing.diagnose import Subject, Verdict, error_of, judge
from moesaic.testing.layout import Layout
from moesaic.testing.record import Check, Index, Run
from moesaic.testing.reference import Getter, Reference
from moesaic.testing.routing import MARGIN

# Where a rank's parameter lies: the name and index in the one process, by the rank's own name for it.
Places = list[dict[str, tuple[str, Index]]]


@dataclass
class Scene:
    """The runs of a layout's ranks, and what to compare them with.

    Attributes:
        groups: the ranks that axes join, by the names of those axes.
        shares: gradients that one process gets from the batch of each rank alone, where they were asked for.
        places: of each rank, where its parameters lie.
        notes: what is worth saying though it is no fault.
        compared: how many values were compared.
        largest: the largest error among those that are equal, in units of noise.
    """

    check: Check
    layout: Layout
    reference: Reference
    runs: list[Run]
    groups: Mapping[str, list[list[int]]]
    shares: Sequence[Mapping[str, Tensor | None]] = ()
    places: Places = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0
    largest: float = 0.0

    def tolerance(self, get: Getter) -> float:
        """See :meth:`Reference.tolerance`."""
        return self.reference.tolerance(get)

    def judge(self, subject: Subject) -> Verdict | None:
        """See :func:`judge`."""
        self.compared += 1
        verdict = judge(subject, self.layout, self.groups)
        if verdict is None:
            self.largest = max(self.largest, MARGIN * error_of(subject))
        return verdict


def times_noise(error: float, tolerance: float) -> float:
    """How many times the noise an error is; 0 where there is no noise."""
    return MARGIN * error / tolerance if tolerance else 0.0
