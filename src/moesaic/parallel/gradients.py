"""Gradients as sums, and their norm over parameters that live on several meshes."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def sum_partial_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """After each backward pass, give every DTensor gradient its parameter's placements.

    For parameters that no FSDP manages: a replicated parameter that met different tokens on every rank has a
    ``Partial`` gradient, which is all-reduced here once and not again in every operation of the optimizer.
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_match_placements)


def _match_placements(parameter: Tensor) -> None:
    grad = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients so that their total norm is at most ``max_norm``, over all meshes.

    ``torch.nn.utils.clip_grad_norm_`` for parameters on different meshes and for plain tensors beside DTensors, which
    torch refuses to mix (pytorch issue 180346). Collective: every rank calls it with the same parameters. The
    gradients of plain parameters count as replicated.

    Args:
        parameters: whose gradients to clip, in place; those without a gradient are skipped.
        max_norm: the largest norm allowed.
        norm_type: p of the p-norm; may be ``inf``.
        error_if_nonfinite: raise where the norm is not finite, before any gradient is changed.
        foreach: use the foreach kernels; None decides by device.

    Returns:
        The total norm before clipping, a plain tensor, the same on every rank; fp32 at least.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    with_grad = [p for p in parameters if p.grad is not None]
    by_mesh: dict[object, list[Tensor]] = {}
    for p in with_grad:
        mesh = p.grad.device_mesh if isinstance(p.grad, DTensor) else None
        by_mesh.setdefault(mesh, []).append(p)
    norms = [_group_norm([p.grad for p in group], norm_type, foreach) for group in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.tensor(0.0)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the total gradient norm is {total.item()}, not finite; no gradient was changed")
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total, foreach=foreach)
    return total


def _group_norm(grads: list[Tensor | None], norm_type: float, foreach: bool | None) -> Tensor:
    whole = [_summed(g) for g in grads if g is not None]
    if math.isinf(norm_type):
        return _largest(whole)
    norm = torch.nn.utils.get_total_norm(whole, norm_type, error_if_nonfinite=False, foreach=foreach)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _largest(grads: list[Tensor]) -> Tensor:
    """The largest magnitude, where torch refuses because a rank's shard is empty."""
    local = [g.to_local(grad_placements=g.placements) if isinstance(g, DTensor) else g for g in grads]
    largest = torch.stack([g.abs().max() if g.numel() else g.new_zeros(()) for g in local]).max()
    # A reduction by MAX may drop a NaN; an infinity it keeps.
    largest = torch.where(largest.isnan(), math.inf, largest)
    if isinstance(grads[0], DTensor):
        mesh = grads[0].device_mesh
        for axis in range(mesh.ndim):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return largest


def _summed(grad: Tensor) -> Tensor:
    """A gradient ready for a norm: in fp32 at least, and not ``Partial``, for a norm is not linear."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if not isinstance(grad, DTensor) or not any(p.is_partial() for p in grad.placements):
        return grad
    return grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
