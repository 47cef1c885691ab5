"""Gradients of expert weights that the backward pass adds to fp32 buffers, as Megatron's `main_grad`.

Under autocast in bf16 the gradient of a weight is otherwise rounded to bf16 before it is made fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.layers import GroupedExperts
from moesaic.parallel.mesh import MeshLayout
from moesaic.sharding.parts import local_part, with_part
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError


def check_main_grads(config: TrainConfig, layout: MeshLayout) -> None:
    """Raise `UserError` if `--main-grads` cannot work with the other settings."""
    if not config.main_grads:
        return
    if config.lora_rank:
        raise UserError("--main-grads: with --lora-rank the experts' weights have no gradient; leave one of them out")
    if config.compute != "local":
        raise UserError("--main-grads: buffers are local tensors; add --compute local")
    if layout.edp > 1:
        raise UserError(
            f"--main-grads: {layout.edp} ranks share the same experts and would have to sum their buffers; choose --ep "
            f"and --etp so that ep * etp is the number of processes, {layout.stage_size}"
        )


class MainGrads:
    """The buffers of all experts of a model. One step: backward pass, :meth:`give`, update, :meth:`clear`."""

    def __init__(self, model: nn.Module):
        self._buffers: list[tuple[nn.Parameter, Tensor]] = []
        for module in model.modules():
            if isinstance(module, GroupedExperts):
                module.main_grads = (self._buffer(module.w1), self._buffer(module.w3), self._buffer(module.w2))

    def give(self) -> None:
        """Make the buffers the gradients of their weights."""
        for weight, buffer in self._buffers:
            weight.grad = with_part(buffer, weight) if isinstance(weight, DTensor) else buffer

    def clear(self) -> None:
        """Zero the buffers, and take them from the weights."""
        for weight, buffer in self._buffers:
            weight.grad = None
            buffer.zero_()

    def _buffer(self, weight: nn.Parameter | None) -> Tensor | None:
        if weight is None:
            return None
        buffer = torch.zeros_like(local_part(weight)[0], requires_grad=False)
        self._buffers.append((weight, buffer))
        return buffer
