"""DTensors on simulated ranks: one process holds the part of every rank, and collectives move them about.

torch's LocalTensorMode runs DTensor's own dispatch, redistribution and autograd, so what happens is what happens on
real ranks, at a few milliseconds a call.
"""

import contextlib
from collections.abc import Iterator, Sequence
from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement

from moesaic.sharding.internals import LocalTensorMode, parts_of
from moesaic.sharding.proof.noise import Tolerance
from moesaic.sharding.proof.placing import join, split


class Ranks:
    """A mesh of simulated ranks."""

    def __init__(self, mesh: DeviceMesh, mode: LocalTensorMode) -> None:
        self.mesh, self._mode = mesh, mode

    def place(self, value: Tensor, placements: Sequence[Placement], seed: int = 0) -> DTensor:
        """``value`` as a DTensor, made of each rank's part without a collective."""
        with self._mode.disable():
            parts = split(value, tuple(placements), tuple(self.mesh.shape), seed)
            stride = value.contiguous().stride()
        local = self._mode.rank_map(lambda rank: parts[rank].clone())
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=value.shape, stride=stride)


@contextlib.contextmanager
def simulated_ranks(*shape: int, names: Sequence[str] = "abc") -> Iterator[Ranks]:
    """A mesh of ``shape``, its axes named ``a``, ``b``, ..., inside a simulation of its ranks.

    Raises:
        ValueError: there is a process group already, which the simulation would have to replace.
    """
    if dist.is_initialized():
        raise ValueError("ranks cannot be simulated once there is a process group; do it in a process without one")
    dist.init_process_group("fake", rank=0, world_size=prod(shape))
    try:
        with LocalTensorMode(prod(shape)) as mode:
            yield Ranks(init_device_mesh("cpu", shape, mesh_dim_names=tuple(names[: len(shape)])), mode)
    finally:
        dist.destroy_process_group()


def whole(t: DTensor, atol: float = 0.0) -> Tensor:
    """The global value, put together from the parts of all ranks; replicas have to be equal.

    ``full_tensor()`` gives the same, as a test shows, but takes ten times as long to simulate.
    """
    value = join(parts_of(t), t.placements, tuple(t.device_mesh.shape), Tolerance(atol=atol))
    assert value is not None, f"replicas differ, or the parts are not {t.placements}"
    assert value.shape == t.shape, f"parts make up {list(value.shape)}, the DTensor says {list(t.shape)}"
    return value


@contextlib.contextmanager
def count_collectives() -> Iterator[dict[str, int]]:
    """How often each collective is called inside; filled in at the end."""
    counts: dict[str, int] = {}
    with CommDebugMode() as counter:
        yield counts
    counts |= {str(op): n for op, n in counter.get_comm_counts().items() if n}


@contextlib.contextmanager
def no_collectives() -> Iterator[None]:
    """Fail if there is a collective inside."""
    with count_collectives() as counts:
        yield
    assert not counts, f"hidden collectives: {counts}"
