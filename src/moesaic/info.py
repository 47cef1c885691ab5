"""What `moesaic info` prints: versions, and which kernels this machine gets."""

import platform
from importlib.metadata import version

import torch

from moesaic.ops import native, pool
from moesaic.ops.processor import INSTRUCTION_SETS, cpuinfo, has_amx

_MB = 1 << 20


def lines() -> list[str]:
    """One line a fact, for people and for bug reports."""
    return [
        f"moesaic {version('moesaic')}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        f"processor: {cpuinfo().get('model name', platform.processor()) or 'unknown'}{_amx()}",
        f"CPU kernels: {_cpu_kernels()}",
        f"pool of large CPU results: {_pool()}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
    ]


def _cpu_kernels() -> str:
    loaded = native.kernels()
    return f"none, {loaded}" if isinstance(loaded, str) else INSTRUCTION_SETS[loaded.isa]


def _amx() -> str:
    return ", with AMX" if has_amx() else ""


def _pool() -> str:
    lent, idle, limit = pool.state()
    if limit == 0:
        return "off"
    return f"{lent // _MB} MB in tensors, {idle // _MB} MB idle, at most {limit // _MB} MB kept idle"
