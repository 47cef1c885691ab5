"""Launches and bytes of device memory of torch's own operations, counted without a device: on meta or fake tensors.

    with Moved() as moved:
        combine(y, slots, positions)
    print(moved.launches, moved.bytes)

Bytes are what an operation has to read and write, each once: of an expanded tensor its memory, of a table the rows that
are gathered from it. Views and allocations cost nothing. What a matrix product moves depends on its
tiles, so those are counted apart, under ``products``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "scalar_tensor"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_grouped_mm"}
# The first tensor of these is a table, of which what they give back is read.
_GATHERS = {"index_select", "gather", "index"}
_FILLS = {"fill_", "zero_"}
# Matrices that are used are neither read nor written, and mostly all are.
_NOTHING = {"zero_unused_"}


class Moved(TorchDispatchMode):
    """Counts what runs inside of it.

    Attributes:
        by_name: bytes by the name of the operation, products left out.
        count: launches by the name of the operation, products among them.
        products: bytes of operands and results of matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        self.products = 0

    @property
    def launches(self) -> int:
        return self.count.total()

    @property
    def bytes(self) -> int:
        return self.by_name.total()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in _ALLOCATIONS or name == "_unsafe_view":
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.count[name] += 1
        if name in _PRODUCTS:
            self.products += sum(map(memory, [*given, *made]))
            return result
        if name in _GATHERS:
            given[:1] = made
        elif name == "_embedding_bag_forward_only":
            made = made[:1]  # the others say what the backward pass of other modes needs
        elif name in _FILLS or name.startswith("new_") or name.endswith("_like"):
            given = []
        elif name in _NOTHING:
            given = given[1:]
        self.by_name[name] += sum(map(memory, [*given, *made]))
        return result


def memory(t: Tensor) -> int:
    """Bytes that a tensor has, those of an expanded one once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * t.element_size()
