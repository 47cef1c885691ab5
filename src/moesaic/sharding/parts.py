"""What of a tensor lies on this rank: all of a plain tensor, a box of a DTensor."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.sharding.internals import Box, box_at, local_of, spec_of, wrap


def local_part(t: Tensor) -> tuple[Tensor, Box]:
    """The tensor on this rank, and which part of the whole it is. Writing into it writes into ``t``."""
    if not isinstance(t, DTensor):
        return t, tuple(slice(0, size) for size in t.shape)
    place = t.device_mesh.get_coordinate()
    if place is None:  # not on the mesh
        return local_of(t), tuple(slice(0, 0) for _ in t.shape)
    return local_of(t), box_at(t, place)


def copy_to_host(t: Tensor) -> Tensor:
    """A copy in the host's memory, laid out as ``t``. Without gradient."""
    if not isinstance(t, DTensor):
        return t.detach().to("cpu", copy=True)
    return wrap(local_of(t).detach().to("cpu", copy=True), spec_of(t))


def with_part(local: Tensor, like: DTensor) -> DTensor:
    """A DTensor laid out as ``like``, of which ``local`` is this rank's part. Without gradient."""
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def ranks_draw_alone(t: Tensor) -> bool:
    """Whether random numbers for ``t`` are every rank's own, so that shards come out equal and copies different.

    DTensor makes the generators of ranks agree on devices whose generator can jump; the CPU's cannot.
    """
    return isinstance(t, DTensor) and t.device_mesh.device_type == "cpu" and t.device_mesh.size() > 1
