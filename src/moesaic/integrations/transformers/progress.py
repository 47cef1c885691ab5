"""Progress reports of long work on checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moesaic.integrations.transformers.lazy import Box, LazyTensor


@dataclass(frozen=True)
class Progress:
    """Two functions that are called while the work goes on.

    Attributes:
        begin: gets the name of the work that begins, and its size in bytes.
        advance: gets the number of bytes that were done since the last call.
    """

    begin: Callable[[str, int], None] = lambda what, num_bytes: None
    advance: Callable[[int], None] = lambda num_bytes: None

    def watch(self, what: str, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Begin work on tensors. Returns tensors that report progress when they are read."""
        self.begin(what, sum(tensor.nbytes for tensor in tensors.values()))
        return {name: self._watched(tensor) for name, tensor in tensors.items()}

    def _watched(self, tensor: LazyTensor) -> LazyTensor:
        def source(box: Box) -> Tensor:
            part = tensor.read(box)
            self.advance(part.nbytes)
            return part

        return LazyTensor(tensor.shape, tensor.dtype, source)
