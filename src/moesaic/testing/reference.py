"""The one process: its exact values, and how far two runs in the precision of the ranks are from them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.testing.record import Run
from moesaic.testing.routing import MARGIN

Getter = Callable[[Run], Tensor | None]


@dataclass(frozen=True)
class Reference:
    """Three runs of one process: in fp64, in the ranks' precision, and in that with sums in another order.

    ``ties`` says for each step how near two scores of ``topk`` may be for rounding to choose between them.
    """

    exact: Run
    plain: Run
    other: Run
    ties: list[float]
    # Values that changed when the plain run was repeated.
    unsteady: list[str]

    def noise(self, get: Getter) -> float:
        """The 2-norm by which an honest run may miss a value: the most by which the three runs differ."""
        exact, plain, other = (get(run) for run in (self.exact, self.plain, self.other))
        if exact is None or plain is None or other is None or not exact.is_floating_point():
            return 0.0
        exact, a, b = exact.double(), plain.double(), other.double()
        found = max(float((x - y).norm()) for x, y in ((a, exact), (b, exact), (a, b)))
        # Even a value that came out exact three times is rounded.
        return max(found, torch.finfo(plain.dtype).eps / 2 * float(exact.norm()))

    def tolerance(self, get: Getter) -> float:
        """The 2-norm of a difference from which on two values count as different."""
        return MARGIN * self.noise(get)
