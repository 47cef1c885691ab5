"""The shared library of the CPU kernels: where it is, and whether it was built from these sources."""

import ctypes
import platform
from pathlib import Path

import torch  # noqa: F401 -- the OpenMP that both use has to be loaded first

PATH = Path(__file__).with_name("libmoesaic_cpu.so")
ABI = 10


def load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "there are none for Arm yet"
    if not PATH.exists():
        return "they were not built: install a C++20 compiler with OpenMP, then moesaic again"
    library = ctypes.CDLL(str(PATH))
    if library.moesaic_cpu_abi() != ABI:
        return f"{PATH} was built from other sources; install moesaic again"
    return library
