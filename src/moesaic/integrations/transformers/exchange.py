"""Lazy tensors whose numbers are on several ranks. One rank at a time reads a box of them.

Every rank reads the same boxes in the same order. The receiver gets the numbers. The other ranks send their parts of
the box, and get a tensor on the meta device.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moesaic import ranks
from moesaic.integrations.transformers.lazy import Box, LazyTensor, overlap, relative
from moesaic.parallel.split import Stages, name_in_whole, whole_of
from moesaic.sharding.internals import box_at


class Exchange:
    """Makes lazy tensors of sharded ones. ``receiver`` is the rank that gets the numbers that are read now."""

    def __init__(self) -> None:
        self.receiver = 0

    def leaf(self, tensor: Tensor) -> LazyTensor:
        """A tensor of the model as a lazy one. A plain tensor is the same on all ranks."""
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return LazyTensor(tensor.shape, tensor.dtype, lambda box: self._own(tensor, box))
        local: Any = tensor.to_local()
        if all(placement.is_replicate() for placement in tensor.placements):
            return LazyTensor(tensor.shape, tensor.dtype, lambda box: self._own(local, box))
        pieces = _pieces(tensor)
        return LazyTensor(tensor.shape, tensor.dtype, lambda box: self._collected(local, pieces, box))

    def of_model(self, model: nn.Module) -> dict[int, LazyTensor]:
        """The state of a whole model, by the ids of the tensors in :func:`whole_of` it. Collective if it is in stages.

        Tied weights are one tensor, and one lazy tensor.
        """
        state: dict[str, Tensor] = whole_of(model).state_dict(keep_vars=True)
        if not isinstance(model, Stages):
            return {id(tensor): self.leaf(tensor) for tensor in state.values()}
        lazy = self.of_stages(model)
        return {id(tensor): lazy[name] for name, tensor in state.items()}

    def of_stages(self, stages: Stages) -> dict[str, LazyTensor]:
        """The state of a whole model, by the names in it, whose layers are on several stages. Collective."""
        first = dist.get_global_rank(stages.meshes.all_ranks(), 0)
        # What is received comes to where this rank computes.
        device = next(stages.parameters()).device
        own: dict[str, Tensor] = {}
        said: dict[str, tuple[torch.Size, torch.dtype, dict[int, Box]]] = {}
        for name, tensor in stages.state_dict(keep_vars=True).items():
            tensor = tensor.detach()
            is_cut = isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements)
            everything = tuple(slice(0, size) for size in tensor.shape)
            name = name_in_whole(name)
            own[name] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            said[name] = tensor.shape, tensor.dtype, _pieces(tensor) if is_cut else {first: everything}
        lazy: dict[str, LazyTensor] = {}
        for of_stage in ranks.gather(said, stages.meshes.stages):
            for name, (shape, dtype, pieces) in of_stage.items():
                local = own.get(name, torch.empty(0, dtype=dtype, device=device))
                lazy[name] = LazyTensor(shape, dtype, partial(self._collected, local, pieces))
        return lazy

    def _own(self, tensor: Tensor, box: Box) -> Tensor:
        return tensor[box].cpu() if self.receiver == ranks.rank() else tensor[box].to("meta")

    def _collected(self, local: Tensor, pieces: dict[int, Box], box: Box) -> Tensor:
        is_receiver = self.receiver == ranks.rank()
        sides = [side.stop - side.start for side in box]
        result = torch.empty(sides, dtype=local.dtype, device="cpu" if is_receiver else "meta")
        for owner, piece in pieces.items():
            if (common := overlap(box, piece)) is None:
                continue
            if owner != ranks.rank() and not is_receiver:
                continue
            if owner == ranks.rank():
                part = local[relative(common, piece)].contiguous()
            else:
                part = torch.empty([side.stop - side.start for side in common], dtype=local.dtype, device=local.device)
                dist.recv(part, owner)
            if is_receiver:
                result[relative(common, box)] = part
            else:
                dist.send(part, self.receiver)
        return result


def _pieces(tensor: DTensor) -> dict[int, Box]:
    """The box that each rank has. Of replicas only the first is in the result."""
    mesh: DeviceMesh = tensor.device_mesh
    axes = [range(1 if p.is_replicate() else size) for p, size in zip(tensor.placements, mesh.shape, strict=True)]
    return {int(mesh.mesh[place]): box_at(tensor, place) for place in itertools.product(*axes)}
