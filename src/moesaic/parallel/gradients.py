"""Gradients as sums, and their norm over parameters that live on several meshes."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

# Of what is not to be summed yet. Backward passes have threads of their own, so no context variable knows.
_LATER = "_moesaic_sum_later"


def sum_partial_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """After each backward pass, give every DTensor gradient its parameter's placements.

    For parameters that no FSDP manages: a replicated parameter that met different tokens on every rank has a
    ``Partial`` gradient, which is all-reduced here once and not again in every operation of the optimizer.
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_match_placements)


@contextmanager
def summed_later(owners: Iterable[Any]) -> Iterator[list[Any]]:
    """Those of some parameters and modules that are summed over ranks now, and inside of it are not.

    What another one around this has is left to that one. What :func:`sum_partial_gradients` does for a parameter waits
    for the next backward pass outside; until then gradients add up.
    """
    mine = [owner for owner in owners if _LATER not in owner.__dict__]
    for owner in mine:
        owner.__dict__[_LATER] = True
    try:
        yield mine
    finally:
        for owner in mine:
            del owner.__dict__[_LATER]


def is_summed_later(owner: Any) -> bool:
    """Whether a parameter or a module is now in :func:`summed_later`."""
    return _LATER in owner.__dict__


def sum_now(parameters: Iterable[Tensor]) -> None:
    """What :func:`sum_partial_gradients` does after a backward pass, where there was none in which its hooks ran.

    Collective over the meshes of the parameters.
    """
    for parameter in parameters:
        _match_placements(parameter)


def _match_placements(parameter: Tensor) -> None:
    if is_summed_later(parameter):
        return
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
    group: dist.ProcessGroup | None = None,
    counted_elsewhere: Iterable[Tensor] = (),
) -> Tensor:
    """Scale gradients so that their total norm is at most ``max_norm``, over all meshes.

    ``torch.nn.utils.clip_grad_norm_`` for parameters on different meshes and for plain tensors beside DTensors, which
    torch refuses to mix (pytorch issue 180346). Collective: every rank calls it with the same parameters. The
    gradients of plain parameters count as replicated. Norms and scaling run on the local shards. All meshes that
    hold every rank share one all-reduce; a gradient that is ``Partial`` needs another.

    Stages of a pipeline hold different parameters of one model. With ``group`` the norm is that of the whole model:
    ``(sum over the ranks of group of n_r^p)^(1/p)``, where ``n_r`` is the norm of the parameters that rank r was given,
    over all their meshes. One small all-reduce more. A weight that two stages share would count twice: the second of
    them names it in ``counted_elsewhere``.

    Args:
        parameters: whose gradients to clip, in place; those without a gradient are skipped.
        max_norm: the largest norm allowed.
        norm_type: p of the p-norm, above 0; may be ``inf``.
        error_if_nonfinite: raise where the norm is not finite, before any gradient is changed.
        foreach: use the foreach kernels; None decides by device.
        group: the ranks that hold other parameters of the same model, one of each stage:
            ``meshes.stages``, or ``mesh["pp"].get_group()``. None where there are no stages.
        counted_elsewhere: of the parameters those whose gradients another rank of ``group`` counts. They are scaled.

    Returns:
        The total norm before clipping, a plain tensor, the same on every rank; fp32 at least.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
        ValueError: ``norm_type`` is not above 0; ``group`` is no process group of this rank, or two of its ranks hold
            the same parameters. Before any collective.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type: expected a number above 0 or inf, got {norm_type}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if group is not None:
        _check_group(group, parameters)
    elsewhere = set(counted_elsewhere)
    counted = [p.grad for p in parameters if p.grad is not None and p not in elsewhere]
    total = _total_norm(counted, norm_type, foreach, group)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the total gradient norm is {total.item()}, not finite; no gradient was changed")
    torch.nn.utils.clip_grads_with_norm_([_holder(g) for g in grads], max_norm, total, foreach=foreach)
    return total


def _check_group(group: Any, parameters: Sequence[Tensor]) -> None:
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"group: expected a process group that this rank is in, such as mesh['pp'].get_group(), got "
            f"{type(group).__name__}"
        )
    members = set(dist.get_process_group_ranks(group))
    for mesh in {p.device_mesh for p in parameters if isinstance(p, DTensor)}:
        shared = sorted(members.intersection(mesh.mesh.flatten().tolist()))
        if len(shared) > 1:
            raise ValueError(
                f"group: its ranks {shared} hold shards of the same parameters, on a mesh of {mesh.mesh_dim_names}, "
                "which would count twice; leave group out, or give one rank of each stage, mesh['pp'].get_group()"
            )


def _holder(grad: Tensor) -> Tensor:
    """A tensor whose gradient is the local shard: DTensor would propagate placements for every gradient scaled."""
    local = _local(grad)
    holder = local.detach()
    holder.grad = local
    return holder


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _total_norm(grads: list[Tensor], p: float, foreach: bool | None, group: dist.ProcessGroup | None) -> Tensor:
    """The p-norm over all ranks of the meshes, and those of ``group``, on the device of the first gradient."""
    # Gradients by mesh, and by how many ranks of it hold each element: every copy counts its part.
    locals_of: dict[DeviceMesh | None, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for grad in grads:
        if isinstance(grad, DTensor):
            grad = _without_partial(grad)
            mesh = grad.device_mesh
            copies = math.prod(mesh.size(i) for i, q in enumerate(grad.placements) if q.is_replicate())
            locals_of[mesh][copies].append(grad.to_local())
        else:
            locals_of[None][1].append(grad)
    merge = torch.maximum if math.isinf(p) else torch.add
    op = dist.ReduceOp.MAX if math.isinf(p) else dist.ReduceOp.SUM
    device = grads[0].device if grads else torch.device("cpu")
    sums: list[Tensor] = []
    on_every_rank: list[Tensor] = []
    for mesh, by_copies in locals_of.items():
        parts = [_power_sum(shards, p, foreach) / (1 if math.isinf(p) else n) for n, shards in by_copies.items()]
        part = functools.reduce(merge, parts)
        if mesh is None:
            sums.append(part.to(device))
        elif mesh.size() == dist.get_world_size():
            on_every_rank.append(part.to(mesh.device_type))
        else:
            part = part.to(mesh.device_type)
            for axis in range(mesh.ndim):
                dist.all_reduce(part, op, group=mesh.get_group(axis))
            sums.append(part.to(device))
    if on_every_rank:
        part = functools.reduce(merge, on_every_rank)
        dist.all_reduce(part, op)
        sums.append(part.to(device))
    total = functools.reduce(merge, sums, torch.zeros((), dtype=torch.float64, device=device))
    if group is not None:
        # In fp64 on all ranks, whatever the dtypes of their gradients.
        total = total.to(_device_of(group))
        dist.all_reduce(total, op, group=group)
        total = total.to(device)
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in grads), torch.float32)
    return (total if math.isinf(p) else total ** (1 / p)).to(dtype)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a group reduces: on the CPU with gloo, on the accelerator with NCCL and its like."""
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None or dist.get_backend(group) == "gloo" else accelerator


def _power_sum(shards: list[Tensor], p: float, foreach: bool | None) -> Tensor:
    """The sum of p-th powers of magnitudes, in fp64; for inf the largest magnitude."""
    # Torch refuses the inf norm of an empty tensor.
    filled = [_at_least_fp32(g) for g in shards if g.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=shards[0].device)
    norm = torch.nn.utils.get_total_norm(filled, p, foreach=foreach).double()
    # A reduction by MAX may drop a NaN; an infinity it keeps.
    return torch.where(norm.isnan(), math.inf, norm) if math.isinf(p) else norm**p


def _at_least_fp32(grad: Tensor) -> Tensor:
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _without_partial(grad: DTensor) -> DTensor:
    """A gradient ready for a norm: not ``Partial``, for a norm is not linear."""
    if not any(p.is_partial() for p in grad.placements):
        return grad
    # A sum in a half type would lose what the norm keeps.
    precise = _at_least_fp32(grad)
    assert isinstance(precise, DTensor)
    return precise.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
