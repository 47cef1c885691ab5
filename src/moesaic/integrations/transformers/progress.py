"""Progress of long work on checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moesaic.integrations.transformers.lazy import Box, LazyTensor


@dataclass(frozen=True)
class Progress:
    """Called as work goes on.

    Attributes:
        begin: with what is about to happen, and the bytes of it.
        advance: with bytes that are done.
    """

    begin: Callable[[str, int], None] = lambda what, num_bytes: None
    advance: Callable[[int], None] = lambda num_bytes: None

    def watch(self, what: str, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Begin work on tensors. Reading the tensors that are given back reports progress."""
        self.begin(what, sum(tensor.nbytes for tensor in tensors.values()))
        return {name: self._watched(tensor) for name, tensor in tensors.items()}

    def _watched(self, tensor: LazyTensor) -> LazyTensor:
        def source(box: Box) -> Tensor:
            part = tensor.read(box)
            self.advance(part.nbytes)
            return part

        return LazyTensor(tensor.shape, tensor.dtype, source)
