"""DTensors on simulated ranks: one process holds the shard of every rank, and collectives move them about.

torch's LocalTensorMode runs DTensor's own dispatch, redistribution and autograd, so what is tested here is what real
ranks do, at a few milliseconds a call.
"""

import contextlib
from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode


class Ranks:
    """A mesh of simulated ranks."""

    def __init__(self, mesh: DeviceMesh, mode: LocalTensorMode) -> None:
        self.mesh, self._mode = mesh, mode

    def place(self, value: Tensor, placements: Sequence[Placement]) -> DTensor:
        """``value`` as a DTensor, made of each rank's part without a collective."""
        shape = tuple(self.mesh.shape)
        parts = self._mode.rank_map(lambda rank: part_of(value, placements, shape, _coordinate(rank, shape)))
        return DTensor.from_local(
            parts, self.mesh, placements, run_check=False, shape=value.shape, stride=value.contiguous().stride()
        )


@contextlib.contextmanager
def simulated_ranks(*shape: int) -> Iterator[Ranks]:
    """A mesh of ``shape``, its axes named ``a``, ``b``, ..., inside a simulation of its ranks."""
    dist.init_process_group("fake", rank=0, world_size=prod(shape))
    try:
        with LocalTensorMode(prod(shape)) as mode:
            yield Ranks(init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)])), mode)
    finally:
        dist.destroy_process_group()


def whole(t: DTensor) -> Tensor:
    """The global value, put together from the parts of all ranks; replicas have to be equal.

    ``full_tensor()`` gives the same, as a test shows, but takes ten times as long to simulate.
    """
    parts = [part for _, part in sorted(t.to_local()._local_tensors.items())]
    for axis in reversed(range(t.device_mesh.ndim)):
        size = t.device_mesh.size(axis)
        parts = [_join(parts[i : i + size], t.placements[axis]) for i in range(0, len(parts), size)]
    assert parts[0].shape == t.shape
    return parts[0]


@contextlib.contextmanager
def no_collectives() -> Iterator[None]:
    """Fail if there is a collective inside."""
    with CommDebugMode() as counter:
        yield
    counts = {str(op): n for op, n in counter.get_comm_counts().items() if n}
    assert not counts, f"hidden collectives: {counts}"


def _join(parts: list[Tensor], placement: Placement) -> Tensor:
    if isinstance(placement, Partial):
        stack = torch.stack(parts)
        return stack.mean(0) if placement.reduce_op == "avg" else stack.sum(0)
    if isinstance(placement, Shard):
        return torch.cat(parts, placement.dim)
    assert all(torch.equal(part, parts[0]) for part in parts), "replicas differ"
    return parts[0]


def _coordinate(rank: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.arange(prod(shape)).view(*shape).eq(rank).nonzero()[0])


def part_of(
    value: Tensor, placements: Sequence[Placement], shape: Sequence[int], coordinate: tuple[int, ...]
) -> Tensor:
    """One rank's part of a global value, axis by axis: the definition of placements."""
    for axis, placement in enumerate(placements):
        if isinstance(placement, Partial):
            total = value * shape[axis] if placement.reduce_op == "avg" else value
            value = _terms(total, shape[axis], seed=hash((axis, coordinate[:axis])))[coordinate[axis]]
        elif isinstance(placement, Shard):
            chunks = value.chunk(shape[axis], placement.dim)
            # torch.chunk gives fewer chunks than asked for where the dim is short; those ranks have nothing.
            missing = shape[axis] - len(chunks)
            value = (*chunks, *[chunks[0].narrow(placement.dim, 0, 0)] * missing)[coordinate[axis]]
        else:
            assert isinstance(placement, Replicate)
    return value.clone()


def _terms(value: Tensor, num_ranks: int, seed: int) -> list[Tensor]:
    """Unrelated integer terms whose sum is ``value``."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    terms = [torch.randint(-4, 5, value.shape, generator=generator).to(value.dtype) for _ in range(num_ranks - 1)]
    return [*terms, value - sum(terms)]
