"""How much memory operators hold, and when it is the most: their results are counted while they live."""

import weakref
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Mark(NamedTuple):
    """Bytes that lived at some moment, and the most since the mark before."""

    live: int
    peak: int


class Ledger(TorchDispatchMode):
    """Counts bytes of all storages that operators make in it, until nobody has them.

    Works on fake tensors, which have sizes and no memory. Storages that were there before do not count.
    """

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.marks: dict[str, Mark] = {}
        self._live = self._peak = 0
        self._known = {t.untyped_storage()._cdata for t in before}

    def mark(self, name: str) -> None:
        self.marks[name] = Mark(self._live, self._peak)
        self._peak = self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
