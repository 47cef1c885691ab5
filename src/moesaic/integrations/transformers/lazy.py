"""Tensors that are described now and read later, one box at a time.

A leaf is a tensor in a file or on other ranks. The operations below make lazy tensors of lazy tensors. A box of the
result is read by reading boxes of the leaves. So a rank can get its slice of a tensor that files store as a hundred
tensors, and it reads no other number. transformers' conversions and the links of our layers are functions of tensors.
They take lazy tensors too, and then return lazy tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

Box = tuple[slice, ...]
"""A slice for each dim, with start and stop, without a step."""


class LazyTensor:
    """A tensor of known shape and dtype. :meth:`read` gets its numbers.

    It has ``mT``, ``transpose``, ``chunk``, ``squeeze``, ``unsqueeze``, ``flatten``, ``contiguous``, ``to`` another
    dtype, indexing by slices, and ``torch.stack``, ``cat``, ``transpose``, ``chunk``, ``split``.

    Args:
        shape, dtype: of the tensor.
        source: returns a box of the tensor. No side of the box is empty.
        fill: copies a box of it into a tensor of the same shape, without a copy in between. None copies what
            ``source`` returns.

    Raises:
        NotImplementedError: an operation that it does not have; the message names it.

    Example:
        >>> rows = LazyTensor(t.shape, t.dtype, lambda box: t[box])
        >>> torch.equal(torch.stack([rows, rows]).read((slice(1, 2), slice(0, 3), slice(0, 4))), t[None, :3, :4])
        True
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: Callable[[Box], Tensor],
        fill: Callable[[Box, Tensor], None] | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._source = source
        self._fill = fill

    def __repr__(self) -> str:
        return f"LazyTensor({list(self.shape)}, {self.dtype})"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def read(self, box: Box | None = None) -> Tensor:
        """The numbers of a box, by default all. Do not write to the result: it may be a view."""
        if box is None:
            box = whole(self.shape)
        sides = [side.stop - side.start for side in box]
        return self._source(box) if all(sides) else torch.empty(sides, dtype=self.dtype)

    def read_into(self, out: Tensor, box: Box) -> None:
        """Copy the numbers of a box into ``out``, which has any dtype. Each leaf goes straight into its place."""
        if out.numel() == 0:
            return
        # In another dtype each number is rounded to this one first.
        if self._fill is None or out.dtype != self.dtype:
            _copy(self.read(box), out)
        else:
            self._fill(box, out)

    def transpose(self, dim0: int, dim1: int) -> LazyTensor:
        a, b = dim0 % self.ndim, dim1 % self.ndim

        def swapped(sides: Sequence[Any]) -> list[Any]:
            sides = list(sides)
            sides[a], sides[b] = sides[b], sides[a]
            return sides

        def transposed(t: Tensor) -> Tensor:
            return t.transpose(a, b)

        return self._view(swapped(self.shape), lambda box: tuple(swapped(box)), transposed, transposed)

    @property
    def mT(self) -> LazyTensor:
        return self.transpose(-2, -1)

    def narrow(self, dim: int, start: int, length: int) -> LazyTensor:
        dim %= self.ndim
        shape = _replaced(self.shape, dim, length)
        return self._view(shape, lambda box: _replaced(box, dim, _shifted(box[dim], start)), _same, _same)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[LazyTensor, ...]:
        length = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
        if sum(sizes) != length:
            raise ValueError(f"cannot split dim {dim} of {list(self.shape)} into pieces of {list(sizes)}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[LazyTensor, ...]:
        return self.split(-(-self.shape[dim] // chunks), dim)

    def unsqueeze(self, dim: int) -> LazyTensor:
        dim %= self.ndim + 1
        shape = [*self.shape[:dim], 1, *self.shape[dim:]]
        return self._view(
            shape, lambda box: (*box[:dim], *box[dim + 1 :]), lambda t: t.unsqueeze(dim), lambda t: t.squeeze(dim)
        )

    def squeeze(self, dim: int) -> LazyTensor:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        shape = [*self.shape[:dim], *self.shape[dim + 1 :]]
        return self._view(
            shape,
            lambda box: (*box[:dim], slice(0, 1), *box[dim:]),
            lambda t: t.squeeze(dim),
            lambda t: t.unsqueeze(dim),
        )

    def flatten(self, start_dim: int) -> LazyTensor:
        """The tensor with all dims from ``start_dim`` on as one. Reads whole rows of the last dim."""
        if self.ndim - start_dim < 2:
            return self
        if self.ndim - start_dim > 2:
            return self.flatten(start_dim + 1).flatten(start_dim)
        width = self.shape[-1]

        def source(box: Box) -> Tensor:
            wanted = box[-1]
            rows = slice(wanted.start // width, -(-wanted.stop // width))
            flat = self.read((*box[:-1], rows, slice(0, width))).flatten(start_dim)
            return flat[..., _shifted(wanted, -rows.start * width)]

        return self._derived([*self.shape[:start_dim], self.shape[start_dim] * width], source)

    def contiguous(self) -> LazyTensor:
        """The tensor itself. The reader decides about the layout."""
        return self

    def to(self, dtype: torch.dtype) -> LazyTensor:
        return LazyTensor(self.shape, dtype, lambda box: self.read(box).to(dtype))

    def __getitem__(self, index: Any) -> LazyTensor:
        index = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(side, slice | EllipsisType) for side in index):
            raise NotImplementedError(f"LazyTensor: cannot be indexed by {index}; use slices and an ellipsis")
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = (*index[:at], *[slice(None)] * (self.ndim - len(index) + 1), *index[at + 1 :])
        result = self
        for dim, side in enumerate(index):
            start, stop, step = side.indices(self.shape[dim])
            result = result.narrow(dim, start, max(stop - start, 0))._every(dim, step)
        return result

    def _every(self, dim: int, step: int) -> LazyTensor:
        """Every ``step``-th index of a dim. Also reads what lies between: files have no strides."""
        if step == 1:
            return self

        def source(box: Box) -> Tensor:
            between = slice(box[dim].start * step, (box[dim].stop - 1) * step + 1)
            return self.read(_replaced(box, dim, between))[(slice(None),) * dim + (slice(None, None, step),)]

        return self._derived(_replaced(self.shape, dim, -(-self.shape[dim] // step)), source)

    def _derived(self, shape: Sequence[int], source: Callable[[Box], Tensor]) -> LazyTensor:
        return LazyTensor(shape, self.dtype, source)

    def _view(
        self,
        shape: Sequence[int],
        here: Callable[[Box], Box],
        view: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> LazyTensor:
        """A view of this tensor: ``here`` is where a box of it lies in this tensor, ``back`` undoes ``view``."""

        def fill(box: Box, out: Tensor) -> None:
            self.read_into(back(out), here(box))

        return LazyTensor(shape, self.dtype, lambda box: view(self.read(here(box))), fill)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in _FUNCTIONS:
            known = ", ".join(sorted(f.__name__ for f in _FUNCTIONS))
            raise NotImplementedError(f"torch.{function.__name__} does not take a LazyTensor; use one of {known}")
        return _FUNCTIONS[function](*args, **(kwargs or {}))


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits. A NaN is not equal to itself, but its bits are."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


def overlap(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, or None if there is none."""
    common = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return common if all(side.start < side.stop for side in common) else None


def relative(box: Box, outer: Box) -> Box:
    """A box, counted from the first corner of a box around it."""
    return tuple(_shifted(side, -around.start) for side, around in zip(box, outer, strict=True))


def _stack(tensors: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _cat(tensors: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    first = tensors[0]
    dim %= first.ndim
    for tensor in tensors:
        if _replaced(tensor.shape, dim, 0) != _replaced(first.shape, dim, 0) or tensor.dtype != first.dtype:
            raise ValueError(f"cannot concatenate {tensor} and {first} along dim {dim}")
    ends = [sum(t.shape[dim] for t in tensors[: i + 1]) for i in range(len(tensors))]

    def pieces(box: Box) -> Iterator[tuple[LazyTensor, Box]]:
        wanted = box[dim]
        for tensor, end in zip(tensors, ends, strict=True):
            start = end - tensor.shape[dim]
            side = slice(max(wanted.start, start) - start, min(wanted.stop, end) - start)
            if side.start < side.stop:
                yield tensor, _replaced(box, dim, side)

    def fill(box: Box, out: Tensor) -> None:
        at = 0
        for tensor, part in pieces(box):
            length = part[dim].stop - part[dim].start
            tensor.read_into(out.narrow(dim, at, length), part)
            at += length

    def source(box: Box) -> Tensor:
        return torch.cat([tensor.read(part) for tensor, part in pieces(box)], dim)

    return LazyTensor(_replaced(first.shape, dim, ends[-1]), first.dtype, source, fill)


def _copy(t: Tensor, out: Tensor) -> None:
    """``out.copy_(t)``, a matrix at a time where it transposes.

    torch goes by blocks only where a whole matrix of the same dtype is written row by row. All else that transposes
    takes three to eight times as long.
    """
    if _are_rows(out) == _are_rows(t):
        out.copy_(t)
    elif out.ndim > 2:
        for of_t, of_out in zip(t.unbind(), out.unbind(), strict=True):
            _copy(of_t, of_out)
    else:
        t, out = (t, out) if _are_rows(out) else (t.mT, out.mT)
        t = t.to(out.dtype)
        out.copy_(t if t.mT.is_contiguous() else t.mT.contiguous().mT)


def _are_rows(t: Tensor) -> bool:
    """Whether neighbours in memory are so in the last dim, and not in the last but one."""
    return t.ndim < 2 or t.stride(-1) <= t.stride(-2)


def _same(t: Tensor) -> Tensor:
    return t


def _replaced(sides: Sequence[Any], dim: int, side: Any) -> tuple[Any, ...]:
    return (*sides[:dim], side, *sides[dim + 1 :])


def _shifted(side: slice, by: int) -> slice:
    return slice(side.start + by, side.stop + by)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.transpose: LazyTensor.transpose,
    torch.chunk: LazyTensor.chunk,
    torch.split: LazyTensor.split,
}
