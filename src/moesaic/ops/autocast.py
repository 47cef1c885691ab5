"""What ``torch.autocast`` does to a matrix product: it casts the operands, and nothing after that."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on; fp64 stays as it is, like in torch's own products."""
    device = tensors[0].device.type
    if not _is_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Compute in the dtypes that are written, on any device."""
    return torch.autocast(device, enabled=False) if _is_enabled(device) else nullcontext()


def untouched_by_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """For the body of an operator: autocast reaches into it, and would take its fp32 sums down to the half type."""

    @functools.wraps(kernel)
    def run(x: Tensor, *args: Any) -> Any:
        with no_autocast(x.device.type):
            return kernel(x, *args)

    return run


def _is_enabled(device: str) -> bool:
    # The meta device knows no autocast, and raises when asked.
    return device != "meta" and torch.is_autocast_enabled(device)
