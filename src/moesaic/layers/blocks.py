"""Random numbers by position: an element of a tensor gets the same number on whatever rank it is.

A tensor in row-major order is cut into blocks of equal length. Each block has a generator of its own, with a seed from
the tensor's name and the block's number. A rank makes the blocks of which it has a part. Torch's generator on CPU
cannot skip numbers. With one generator for the whole tensor, every rank would have to make all numbers.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 18
# The number of elements of a rank's part that are filled at a time.
_CHUNK = 1 << 20

# Fills a tensor in place with numbers from a generator.
Draw = Callable[[Tensor, torch.Generator], object]


class _Dim(NamedTuple):
    """A dim of a box: its start, its length, and the size of the dim in the whole tensor."""

    start: int
    length: int
    size: int


@torch.no_grad()
def fill_by_position(local: Tensor, box: tuple[slice, ...], shape: torch.Size, key: str, draw: Draw) -> None:
    """Fill this rank's part of a tensor, in place.

    The numbers are drawn on the CPU, in fp32 for half dtypes. So they are the same on every device.

    Args:
        local: this rank's part.
        box: the place of that part in the whole tensor.
        shape: the shape of the whole tensor.
        key: another key gives other numbers.
        draw: fills a block.
    """
    if not local.is_contiguous():
        filled = torch.empty(local.shape, dtype=local.dtype, device=local.device)
        fill_by_position(filled, box, shape, key, draw)
        local.copy_(filled)
        return
    dtype = torch.promote_types(local.dtype, torch.float32)
    flat, dims = local.view(-1), _merged(box, shape)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        places = _places(start, chunk.numel(), dims)
        first, last = int(places[0]) // BLOCK, int(places[-1]) // BLOCK
        ends = torch.searchsorted(places, torch.arange(first + 1, last + 2) * BLOCK).tolist()
        values, begin = torch.empty(chunk.numel(), dtype=dtype), 0
        for block, end in zip(range(first, last + 1), ends, strict=True):
            if begin < end:
                numbers = torch.empty(BLOCK, dtype=dtype)
                draw(numbers, torch.Generator().manual_seed(_seed(key, block)))
                values[begin:end] = numbers[places[begin:end] - block * BLOCK]
            begin = end
        chunk.copy_(values)


def _places(first: int, number: int, dims: list[_Dim]) -> Tensor:
    """The places of the elements ``first, first + 1, ...`` of a box in the whole tensor, in ascending order."""
    rest = torch.arange(first, first + number)
    places, inside, outside = torch.zeros_like(rest), 1, 1
    for dim in reversed(dims):
        index = rest // inside if inside > 1 else rest
        if dim is not dims[0]:
            index = index % dim.length
        places += (index + dim.start) * outside
        inside, outside = inside * dim.length, outside * dim.size
    return places


def _merged(box: tuple[slice, ...], shape: torch.Size) -> list[_Dim]:
    """The dims of a box, outermost first. A dim that the box has whole is merged with the one before it."""
    dims: list[_Dim] = []
    for part, size in zip(box, shape, strict=True):
        dims.append(_Dim(part.start, part.stop - part.start, size))
        while len(dims) > 1 and dims[-1].length == dims[-1].size:
            inner, outer = dims.pop(), dims.pop()
            dims.append(_Dim(*(n * inner.size for n in outer)))
    return dims


def _seed(key: str, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{key} {block}".encode()).digest()[:8], "big")
