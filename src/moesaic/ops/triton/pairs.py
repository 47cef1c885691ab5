"""Two tensors of one shape and layout as one descriptor, so that a kernel loads from either in one loop.

A descriptor has an address and strides. How far the second tensor lies from the first is a stride like the others.
"""

from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Strides of a descriptor, in bytes, are below this.
_FARTHEST = 1 << 40


class Pair(NamedTuple):
    """Two tensors as a kernel's argument.

    Attributes:
        data: a descriptor of both, with a leading dim of 2.
        first: the place of the first one in that dim: 1 where it lies behind the second.
    """

    data: TensorDescriptor
    first: int


def can_pair(first: Tensor, second: Tensor) -> bool:
    """Whether :func:`as_pair` takes them, if each can have a descriptor by itself."""
    is_alike = first.shape == second.shape and first.stride() == second.stride() and first.dtype == second.dtype
    distance = abs(second.data_ptr() - first.data_ptr())
    # Tensors without memory are compiled for.
    return is_alike and (0 < distance < _FARTHEST or first.is_meta)


def as_pair(first: Tensor, second: Tensor, block: list[int]) -> Pair:
    """A descriptor whose blocks are of one of the two."""
    distance = (second.data_ptr() - first.data_ptr()) // first.element_size()
    nearest = first if distance >= 0 else second
    descriptor = TensorDescriptor(nearest, [2, *first.shape], [abs(distance), *first.stride()], [1, *block])
    return Pair(descriptor, int(distance < 0))
