"""Memory for large results of the CPU kernels: on huge pages, and used again when a tensor has died.

A fresh tensor above the size that the C library keeps costs 0.4 ms a megabyte in page faults, which is more than the
arithmetic of a weight gradient. Results of at least ``SMALLEST`` bytes lie in a pool instead, which keeps at most
``MOESAIC_CPU_POOL_MB`` megabytes idle (default 1024; 0 switches the pool off; read at the first large result).
"""

import ctypes
import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.native import DTYPES, Kernels, kernels

SMALLEST = 4 << 20
_DEFAULT_MB = 1024


class PoolState(NamedTuple):
    """Bytes in living tensors, bytes kept for the next ones, and the most that are kept; a limit of 0 is no pool."""

    lent: int
    idle: int
    limit: int


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor, in the pool if it is large."""
    loaded = kernels()
    if (
        isinstance(loaded, str)
        or dtype not in DTYPES
        or dtype.itemsize * torch.Size(shape).numel() < SMALLEST
        or limit(loaded) == 0
        or torch.are_deterministic_algorithms_enabled()  # torch fills what is uninitialised then
    ):
        return torch.empty(shape, dtype=dtype)
    managed = loaded.library.moesaic_pool_tensor((ctypes.c_int64 * len(shape))(*shape), len(shape), DTYPES[dtype])
    if not managed:
        raise torch.OutOfMemoryError(f"no memory for a tensor of shape {list(shape)} and {dtype}")
    # The tensor owns the memory from here on, and gives it back from whichever thread it dies on.
    return torch.utils.dlpack.from_dlpack(_new_capsule(managed, b"dltensor", None))


def state() -> PoolState:
    """What the pool holds."""
    loaded = kernels()
    if isinstance(loaded, str):
        return PoolState(0, 0, 0)
    lent, idle = ctypes.c_int64(), ctypes.c_int64()
    loaded.library.moesaic_pool_state(ctypes.byref(lent), ctypes.byref(idle))
    return PoolState(lent.value, idle.value, limit(loaded))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


@functools.cache
def limit(loaded: Kernels) -> int:
    """The most bytes that are kept idle. The kernels' own buffers lie in the pool too, once this was called."""
    text = os.environ.get("MOESAIC_CPU_POOL_MB", str(_DEFAULT_MB))
    if not text.isdecimal():
        raise ValueError(f"MOESAIC_CPU_POOL_MB: got {text!r}; give a number of megabytes, 0 for no pool")
    most = int(text) << 20
    loaded.library.moesaic_pool_limit(most)
    return most
