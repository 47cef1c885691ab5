"""The device and the rank of a process, and the process group that torchrun asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moesaic import ranks
from moesaic.sharding.internals import silence_advice_on_redistribution
from moesaic.train.errors import UserError
from moesaic.train.peers import Peers

# Before the first step a process may prepare a large text, or load a large model, while the others wait.
_START_UP = timedelta(minutes=30)


@dataclass(frozen=True)
class Runtime:
    """This process among its peers."""

    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    peers: Peers | None = None
    """Those that this process watches, if there are others."""

    @property
    def leader(self) -> bool:
        """Whether this is the process that writes to the screen and the run folder."""
        return self.rank == 0

    @property
    def host_leader(self) -> bool:
        """Whether this is the first process of its host."""
        return self.local_rank == 0

    def slowly(self) -> AbstractContextManager[None]:
        """For what may take long on one rank while the others wait. Collective."""
        return nullcontext() if self.peers is None else self.peers.slowly()

    def wait_for_long(self) -> None:
        """From now on collectives may wait for long."""
        if self.peers is not None:
            self.peers.wait_for_long()


def launched_world_size() -> int:
    """The number of processes that were launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str | None, local_rank: int) -> torch.device:
    """The device of type `name`, or the accelerator that is there and has a communication backend, or the CPU.

    The local rank picks among several. Raises `UserError` if there is none for it.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        usable = found is not None and dist.is_available() and _backend(found.type) not in (None, "gloo")
        name = found.type if found is not None and usable else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: torch has no such device type") from error
    if wanted.index is not None:
        raise UserError(
            f"--device takes a type, such as {wanted.type}, without a number; LOCAL_RANK chooses the device"
        )
    if wanted.type == "cpu":
        return wanted
    if found is None or found.type != wanted.type:
        there = "cpu" if found is None else f"cpu and {found.type}"
        raise UserError(f"--device {name}: this machine has no such device, only {there}")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise UserError(
            f"there is no {wanted.type} device for process {local_rank} of this host, which has {count}: "
            f"launch at most {count} processes on a host, or use --device cpu"
        )
    return torch.device(wanted.type, local_rank)


@contextmanager
def started(device_name: str | None, timeout: int | float = 300) -> Iterator[Runtime]:
    """Join the process group of the launcher, if there is more than one process, and leave it at the end.

    A process group that exists already is used, and kept. `timeout` is for :class:`Peers`.
    """
    silence_advice_on_redistribution()  # for those who choose placements; here it would only hide what matters
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(device_name, local_rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    joined = launched_world_size() > 1 and not dist.is_initialized()
    if joined:
        backend = _backend(device.type) or "gloo"
        # Objects and checkpoints' plans travel between CPUs whatever the device.
        _join("gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}", timedelta(seconds=timeout))
    peers: Peers | None = None
    try:
        if ranks.active():
            peers = Peers(ranks.rank(), ranks.world_size(), timeout)
        yield Runtime(device, ranks.rank(), local_rank, ranks.world_size(), peers)
        if joined:
            # gloo's threads may hold a tensor for a moment after its collective, and abort the process where they let
            # go of it when Python is ending already (pytorch/pytorch#190489). While this waits, they do.
            dist.barrier()
    finally:
        if peers is not None:
            peers.close()
        if joined:
            dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    """Make the process group of the launch.

    torchrun starts processes again with the store of those before (torch 2.13), in which gloo would find the addresses
    of dead processes, and wait for them. So names in it carry the number of the start.
    """
    timeout = max(_START_UP, timeout)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    own = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has had: of the accelerator's memory, or of the host's on CPU. 0 if unknown."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    # In KiB, but in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _backend(device_type: str) -> str | None:
    try:
        backend = dist.get_default_backend_for_device(device_type)
    except ValueError:
        return None
    return backend if dist.is_backend_available(backend) else None
