"""An exchange of bounded size: no count is read to the host, and what is beyond the bound spoils the step, in the open.

Every rank has room for ``capacity`` copies of tokens from each other rank, whatever the routing is. Where more are
routed, the results and gradients of that rank's tokens are NaN, and :func:`skip_overflowed_steps` leaves the weights as
they are.

Legend: T tokens, P ep ranks, Q ranks that a token goes to at most, B rows for each rank (the capacity).
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moesaic import ranks
from moesaic.layers import MoE
from moesaic.ops import Permutation
from moesaic.ops.arguments import check_int
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.traffic import Split, Traffic


def check_capacity(capacity: Any) -> None:
    """Raise unless a capacity is None or a number of copies."""
    if capacity is None:
        return
    check_int("capacity", capacity)
    if capacity < 1:
        raise ValueError(f"capacity: must be at least 1 copy, got {capacity}; give None for no bound")


def bounded_traffic(capacity: int, ep: int, etp: int) -> Traffic:
    """What goes where: as much to and from every rank."""
    rows = ep * capacity
    # As many copies as rows, which is the most: a row is sent for its first copy.
    return Traffic((Split([capacity] * ep, [capacity] * ep),), [rows] * etp, rows * etp, rows * etp, rows * etp)


def in_places(sent: Permutation, num_ranks: int, capacity: int) -> Permutation:
    """Rows of rank ``p`` from row ``p * capacity`` on; what is beyond has no row. No value is read to the host."""
    first_P = sent.group_sizes.cumsum(0) - sent.group_sizes
    rows_R = torch.arange(len(sent.slots), device=sent.slots.device)
    rank_R = torch.searchsorted(first_P, rows_R, right=True) - 1
    nth_R = rows_R - first_P[rank_R]
    has_place = (nth_R < sent.group_sizes[rank_R]) & (nth_R < capacity)
    places_R = torch.where(has_place, rank_R * capacity + nth_R, num_ranks * capacity)
    # What has no place is written past the end.
    slots = sent.slots.new_full((num_ranks * capacity + 1,), -1).scatter(0, places_R, sent.slots)[:-1]
    places_R = torch.nn.functional.pad(torch.where(has_place, places_R, -1), (0, 1), value=-1)
    # Position -1 is the entry that was added at the end.
    return Permutation(slots, places_R[sent.positions], sent.group_sizes)


def spoiled(z: Tensor, most: Tensor, capacity: int) -> Tensor:
    """Results as they are, or NaN where there were more copies than have room."""
    return z + torch.where(most > capacity, torch.nan, 0.0).to(z.dtype)


def most_copies(model: nn.Module, meshes: Meshes) -> int:
    """The most copies of tokens that a rank routed to one rank's experts, in any layer since this was last asked.

    A step fits if this is at most the ``capacity`` of :func:`moesaic.parallelize`: measure some steps without one, and
    give a little more. Where experts are on one rank nothing is sent, and it is 0.

    Collective over all ranks of the meshes, and of all stages of a pipeline. The one place where a number is read to
    the host.
    """
    if not meshes.is_distributed:
        return 0
    most = torch.zeros((), dtype=torch.int64, device=meshes.dense.device_type)
    for moe in model.modules():
        # Where experts are on one rank there is another dispatcher, which sends nothing.
        if isinstance(moe, MoE) and isinstance(found := getattr(moe.dispatcher, "most", None), Tensor):
            most = torch.maximum(most, found)
            found.zero_()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=meshes.all_ranks())
    if meshes.stages is not None:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=meshes.stages)
    return int(most)


def skip_overflowed_steps(optimizer: Optimizer, model: nn.Module, meshes: Meshes) -> RemovableHandle:
    """Let steps of the optimizer change nothing where more copies were routed than ``capacity`` has room for.

    Gradients of all parameters are dropped on all ranks before such a step, and a warning says how many copies there
    were. It is a pre-hook of the optimizer's step: call ``step()`` on all ranks.

    Raises:
        ValueError: in a step with a closure, which makes gradients after the hook has looked. On all ranks that give
            one, and before anything is sent.

    Example:
        >>> model = moesaic.parallelize(model, meshes, capacity=4096)
        >>> handle = moesaic.parallel.skip_overflowed_steps(optimizer, model, meshes)
    """
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    capacity = next((c for moe in moes if (c := getattr(moe.dispatcher, "capacity", None)) is not None), None)
    if meshes.stages is not None:
        # A stage may have no layer with experts.
        capacity = next((c for c in ranks.gather(capacity, meshes.stages) if c is not None), None)

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if capacity is None:
            return
        # The first of the arguments is the optimizer itself.
        if any(callable(value) for value in (*args[1:], kwargs.get("closure"))):
            raise ValueError(
                "closure: makes gradients after skip_overflowed_steps has looked whether they are whole; call backward "
                "before, and step() without a closure"
            )
        if (most := most_copies(model, meshes)) <= capacity:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        warnings.warn(
            f"capacity: {most} copies were routed to one rank and there is room for {capacity}; this step "
            "changes no weight. Give parallelize a larger capacity",
            stacklevel=2,
        )

    return optimizer.register_step_pre_hook(before)
