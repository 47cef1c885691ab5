"""What is known of this machine's processor. Nothing else asks for it, and only this names instruction sets.

``MOESAIC_CPU_ISA`` names the instruction set for the CPU kernels in place of the usual one, or ``none`` to do without
them. It is read once, when the processor is first asked for.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch

from moesaic.ops import library

# What the CPU kernels have code for, from worst to best, and after the best what nobody gets without asking: AMX's
# tiles, of which no processor was at hand to measure them, and the same kernels with tiles in memory, for tests. The
# order is that of `csrc/instruction_sets.cpp`.
INSTRUCTION_SETS = ("none", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")

_VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}


class Processor(NamedTuple):
    """A kind of processor.

    Attributes:
        vendor: ``"Intel"``, ``"AMD"``, or whatever else it says; empty where it says nothing.
        has_amx: whether torch's half-precision products run on AMX tiles.
        best: the best instruction set that it and this build of the kernels have.
        kernels: the one that the kernels use.
    """

    vendor: str
    has_amx: bool
    best: str
    kernels: str

    @property
    def usual(self) -> str:
        """The instruction set that the kernels use unless ``MOESAIC_CPU_ISA`` names another.

        It is the best one, except on Intel processors with bf16 instructions and without AMX. There a bf16 instruction
        takes four times as long as one in fp32 that does half its work, so bf16 is converted to fp32.
        """
        converts = self.vendor == "Intel" and not self.has_amx and self.best == "avx512_bf16"
        return "avx512" if converts else self.best


@functools.cache
def processor() -> Processor:
    """This machine's.

    Raises:
        ValueError: ``MOESAIC_CPU_ISA`` names no instruction set, or one that is not here.
    """
    vendor = cpuinfo().get("vendor_id", "")
    loaded = library.load()
    if isinstance(loaded, str):
        return Processor(_VENDORS.get(vendor, vendor), has_amx(), "none", "none")
    best = INSTRUCTION_SETS[loaded.moesaic_cpu_isa()]
    machine = Processor(_VENDORS.get(vendor, vendor), has_amx(), best, best)
    wanted = os.environ.get("MOESAIC_CPU_ISA", machine.usual)
    if wanted not in (best, "none"):
        here = tuple(name for i, name in enumerate(INSTRUCTION_SETS) if name == "none" or loaded.moesaic_cpu_has_isa(i))
        if wanted not in here:
            raise ValueError(f"MOESAIC_CPU_ISA: got {wanted!r}; choose one of {here}")
    return machine._replace(kernels=wanted)


def kernels_for(isa: str, dtype: torch.dtype) -> str:
    """The instruction set whose kernels those of ``isa`` are for a dtype: fp32 has no use for bf16 or tiles."""
    return "avx512" if isa in ("avx512_bf16", "amx", "amx_emulated") and dtype == torch.float32 else isa


@functools.cache
def has_amx() -> bool:
    """Whether torch's half-precision products run on AMX tiles."""
    return torch.cpu._is_amx_tile_supported()


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
