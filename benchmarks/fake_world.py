"""One process that takes itself for one of many ranks: torch's process group that sends nothing.

What ranks tell one another before they compute is then what this one says. Tensors that arrive hold anything, so
computations run on fake tensors, which have sizes and no values, with a capacity, by which all sizes are known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import moesaic
from moesaic.parallel import plan


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """This process is the first of ``size`` ranks."""

    def same(values: list[Any], value: Any, group: Any = None) -> None:
        values[:] = [value] * len(values)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with mock.patch.object(dist, "all_gather_object", same):
            yield
    finally:
        dist.destroy_process_group()


def laid_out(model: Any, meshes: moesaic.parallel.Meshes, mode: FakeTensorMode, **options: Any) -> Any:
    """A model on the meta device, parallelized, with fake memory."""
    inner = plan.materialize

    def materialize(model: Any, device: torch.device) -> None:
        with mode:
            inner(model, device)

    with mock.patch.object(plan, "materialize", materialize):
        return moesaic.parallelize(model, meshes, **options)
