"""The border between local tensors and DTensors. Every crossing states the placements of its gradient."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from moesaic.sharding.rule import Placements

_FROM_LOCAL_KNOWS_GRADIENTS = "grad_placements" in inspect.signature(DTensor.from_local).parameters


def to_dtensor(
    local: Tensor, mesh: DeviceMesh, placements: Placements, *, grad_placements: Placements | None, blocks: int
) -> DTensor:
    """The DTensor whose dim 0 is ``blocks`` blocks, of which ``local`` is this rank's.

    ``DTensor.from_local`` would gather a ``Partial`` gradient where the forward placement is ``Replicate``; here the
    gradient arrives with ``grad_placements`` and its local part is passed on as it is.
    """
    if torch.compiler.is_compiling():
        if not _FROM_LOCAL_KNOWS_GRADIENTS:
            raise NotImplementedError(
                'compute="dtensor" under torch.compile needs a torch whose DTensor.from_local takes grad_placements; '
                'use parallelize(..., compute="local")'
            )
        # The same in torch's own words, which its compiler knows.
        return _in_blocks(local, mesh, placements, blocks, grad_placements=grad_placements)
    return _ToDTensor.apply(local, mesh, placements, grad_placements, blocks)


def _in_blocks(local: Tensor, mesh: DeviceMesh, placements: Placements, blocks: int, **options: Any) -> DTensor:
    local = local.contiguous()
    shape = torch.Size((blocks * local.shape[0], *local.shape[1:]))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=local.stride(), **options)


class _ToDTensor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        mesh: DeviceMesh,
        placements: Placements,
        grad_placements: Placements | None,
        blocks: int,
    ) -> DTensor:
        ctx.grad_placements = grad_placements
        return _in_blocks(local.detach(), mesh, placements, blocks)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        return from_dtensor(grad, ctx.grad_placements, grad_placements=ctx.grad_placements), None, None, None, None


def from_dtensor(t: Tensor, placements: Placements, *, grad_placements: Placements) -> Tensor:
    """The local part of a DTensor that is placed as ``placements``.

    Raises:
        ValueError: it is placed otherwise. Redistributing it here would hide a collective.
    """
    if not isinstance(t, DTensor):
        raise ValueError(f"expected a DTensor placed {list(placements)}, got a plain tensor")
    if tuple(t.placements) != tuple(placements):
        raise ValueError(f"expected a DTensor placed {list(placements)}, got {list(t.placements)}")
    return t.to_local(grad_placements=grad_placements)


def counted_once(local: Tensor, axis: DeviceMesh) -> Tensor:
    """A term of a sum over the ranks of a mesh axis that every rank has: itself on the first, zeros on the others.

    Its gradient is that of the sum, which every rank has.
    """
    return _CountedOnce.apply(local, axis.get_local_rank() == 0)


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Tensor, is_first: bool) -> Tensor:
        return term.view_as(term) if is_first else torch.zeros_like(term)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def compute_on_local(module: nn.Module) -> None:
    """Let a module compute with the local parts of its own DTensor parameters.

    For modules whose inputs are this rank's tokens, or this rank's heads: a replicated parameter meets different data
    on every rank, so its gradient is ``Partial``; a sharded one has the gradient of its shard.
    """
    module.register_forward_pre_hook(_shadow_parameters)
    module.register_forward_hook(unshadow_parameters, always_call=True)


def _shadow_parameters(module: nn.Module, args: Any) -> None:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor):
            grads = [Partial() if p.is_replicate() else p for p in parameter.placements]
            # An entry of the instance's own dict is found before a parameter is.
            module.__dict__[name] = parameter.to_local(grad_placements=grads)


def unshadow_parameters(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: the module's parameters are found again under their names."""
    for name in module._parameters:
        module.__dict__.pop(name, None)
