"""Boxes of sharded tensors, brought to the rank that wants them: what is lazy here is on other ranks.

Every rank reads the same boxes in the same order. The one whose turn it is gets the numbers; the others send what they
have of them, and get a tensor on the meta device.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moesaic import ranks
from moesaic.integrations.transformers.lazy import Box, LazyTensor, overlap, relative
from moesaic.sharding.internals import box_at


class Exchange:
    """Whose turn it is: ``receiver`` is the rank that gets what is read now."""

    def __init__(self) -> None:
        self.receiver = 0

    def leaf(self, tensor: Tensor) -> LazyTensor:
        """A tensor of the model: plain ones are the same on all ranks."""
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return LazyTensor(tensor.shape, tensor.dtype, lambda box: self._own(tensor, box))
        local: Any = tensor.to_local()
        if all(placement.is_replicate() for placement in tensor.placements):
            return LazyTensor(tensor.shape, tensor.dtype, lambda box: self._own(local, box))
        pieces = _pieces(tensor)
        return LazyTensor(tensor.shape, tensor.dtype, lambda box: self._collected(local, pieces, box))

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
    """Which rank has which box: of replicas the first."""
    mesh: DeviceMesh = tensor.device_mesh
    axes = [range(1 if p.is_replicate() else size) for p, size in zip(tensor.placements, mesh.shape, strict=True)]
    return {int(mesh.mesh[place]): box_at(tensor, place) for place in itertools.product(*axes)}
