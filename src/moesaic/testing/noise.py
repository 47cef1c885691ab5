"""Sums in another order: what an ordinary run in the same precision may differ by."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class OtherOrder(TorchDispatchMode):
    """Products of matrices and plain sums add their terms in reversed order, forward and backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.mm.default, _aten.bmm.default):
            return func(*_reversed_terms(*args[:2]), *args[2:], **kwargs)
        if func in (_aten.addmm.default, _aten.baddbmm.default):
            return func(args[0], *_reversed_terms(*args[1:3]), *args[3:], **kwargs)
        if func in (_aten.sum.default, _aten.sum.dim_IntList) and args[0].is_floating_point():
            return func(args[0].flip(list(range(args[0].ndim))), *args[1:], **kwargs).flip(_kept(func, args, kwargs))
        return func(*args, **kwargs)


def _reversed_terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.flip(-1), b.flip(-2)


def _kept(func: Any, args: Any, kwargs: Any) -> list[int]:
    """The dims of the result of a sum: those that were reversed and not summed have to be reversed back."""
    x = args[0]
    if func is _aten.sum.default:
        return []
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    summed = {d % x.ndim for d in dims} if dims and x.ndim else set(range(x.ndim))
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return list(range(x.ndim if keep else x.ndim - len(summed)))
