"""What of a GPU a launch depends on."""

import functools
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A GPU.

    Attributes:
        kind: the column of the table of configurations: ``"hopper"`` (9.0 and 10.x, 227 KB of shared memory a block),
            ``"ampere"`` (8.0, 163 KB), ``"small"`` (all else, ROCm too) or ``"interpreted"``.
        num_sms: multiprocessors; a persistent kernel has that many programs, or a multiple.
        has_tma: whether blocks of a weight come by its tensor memory accelerator.
        is_sm90: whether it is of compute capability 9.x, for which triton makes groups of warps of which one loads and
            the others multiply.
    """

    kind: str
    num_sms: int
    has_tma: bool
    is_sm90: bool = False


# For the interpreter: so few that a program has several tiles.
INTERPRETED = Device("interpreted", 3, False)


@functools.cache
def describe(device: torch.device) -> Device:
    """The GPU of a tensor."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("small", properties.multi_processor_count, False)
    return nvidia((properties.major, properties.minor), properties.multi_processor_count)


def nvidia(capability: tuple[int, int], num_sms: int) -> Device:
    """A GPU of that compute capability."""
    major = capability[0]
    kind = {(8, 0): "ampere", (9, 0): "hopper"}.get(capability, "hopper" if major == 10 else "small")
    return Device(kind, num_sms, major >= 9, major == 9)
