"""How many forward passes a step has, which torchtitan does not tell its layers.

Each forward pass of a layer has a balance loss, a mean over the tokens of that pass. So a step has a sum of as many,
and they are divided by their number. A wrong number would change how strong the losses are, and nothing would say so.
"""

import functools
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moesaic.layers.recompute import count_once

_WATCHED: "WeakSet[ForwardsPerStep]" = WeakSet()


class ForwardsPerStep:
    """Counts the forward passes of a layer until the first step of an optimizer, and compares.

    Forward passes that activation checkpointing runs again do not count.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self._seen: Tensor | None = None

    def start(self, device: torch.device | None) -> Tensor:
        """Count from now on, in the tensor that is returned."""
        self._seen, self._one = (make(1, dtype=torch.int64, device=device) for make in (torch.zeros, torch.ones))
        _watch_optimizers()
        _WATCHED.add(self)
        return self._seen

    def one_more(self) -> None:
        if self._seen is not None:
            count_once(self._seen, self._one)

    def check(self) -> None:
        """Raise ``ValueError`` if there was another number of forward passes. Only the first step is looked at."""
        seen = 0 if self._seen is None else int(self._seen)
        if seen == 0:  # a step of some other model
            return
        _WATCHED.discard(self)
        if seen != self.expected:
            raise ValueError(
                f"forwards_per_step: the first step had {seen} forward passes of each layer, and the balance losses "
                f"are divided by {self.expected}; give the override forwards_per_step={seen}, the steps of gradient "
                "accumulation times the microbatches of the pipeline"
            )


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(*_: Any) -> None:
    for count in list(_WATCHED):
        count.check()
