"""A quantised weight as a part of a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.ops.quantized import QuantizedWeight


class PackedWeight(nn.Module):
    """A :class:`moesaic.ops.QuantizedWeight` in the place of a parameter: read-only, with its tensors as buffers.

    Args:
        weight: the weight. Its tensors may be DTensors.
        dtype: that of the weight before. Adapters are made in it.

    Attributes:
        data, scales: the buffers.
        format, flat_sizes: see :class:`moesaic.ops.QuantizedWeight`.
    """

    data: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("data", weight.data)
        self.register_buffer("scales", weight.scales)
        self.format, self.flat_sizes, self.dtype = weight.format, weight.flat_sizes, dtype

    @property
    def weight(self) -> QuantizedWeight:
        """What the operators take."""
        return QuantizedWeight(self.data, self.scales, self.format, self.flat_sizes)

    @property
    def shape(self) -> torch.Size:
        """``[E, I, O]``, of the weight before."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def reset_parameters(self) -> None:
        """Raise ``ValueError``: there are no initial values."""
        raise ValueError(
            "PackedWeight: quantised weights have no initial values; quantise a model that has its weights, or load a "
            "checkpoint"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        def moved(t: Tensor) -> Tensor:
            # Scales are fp32 whatever the dtype of the model.
            result = fn(t)
            return result if result.dtype == t.dtype else t.to(result.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self.format}, {list(self.shape)}"


def unpacked(w: Any) -> Any:
    """What the operators take, of an attribute of a module that may be a packed weight."""
    return w.weight if isinstance(w, PackedWeight) else w
