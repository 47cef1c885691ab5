"""What torch has no public way for. The only file that touches private parts of torch.distributed.

DTensor's spec and local tensor, redistribution without autograd, the propagation of torch's own rules, simulated ranks:
torch may rename any of these in any release, so everything else in moesaic asks for them here. A test keeps it so.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from math import prod
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode, maybe_run_for_local_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._redistribute import redistribute_local_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

from moesaic.ranks import PATIENT

__all__ = ["DTensorSpec", "LocalTensorMode", "maybe_run_for_local_tensor", "redistribute_local_tensor"]

# Attributes, and so as fast as torch's own code.
spec_of: Callable[[Any], DTensorSpec] = attrgetter("_spec")
local_of: Callable[[Any], Tensor] = attrgetter("_local_tensor")

Box = tuple[slice, ...]


def make_spec(mesh: DeviceMesh, placements: Sequence[Placement], like: Tensor) -> DTensorSpec:
    """What a DTensor says of itself: its placements, and the shape, strides and dtype of ``like``, which are global."""
    return DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(like.shape, like.stride(), like.dtype))


def moved(spec: DTensorSpec, placements: Sequence[Placement]) -> DTensorSpec:
    """The same tensor with other placements."""
    return DTensorSpec(spec.mesh, tuple(placements), tensor_meta=spec.tensor_meta)


def meta_of(spec: DTensorSpec) -> TensorMeta:
    """Global shape, strides and dtype."""
    assert spec.tensor_meta is not None
    return spec.tensor_meta


def wrap(local: Tensor, spec: DTensorSpec) -> DTensor:
    """A DTensor without autograd. It takes half as long as with ``__init__``, which does nothing."""
    return DTensor.__new__(DTensor, local, spec, requires_grad=False)


def replicates_implicitly() -> bool:
    """Whether the user has allowed plain tensors among DTensors (``implicit_replication()``)."""
    return DTensor._op_dispatcher._allow_implicit_replication


def torch_has_rule(op: torch._ops.OpOverload) -> bool:
    """Whether DTensor itself knows what to do with an operator."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    registries = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")  # the second since torch 2.12
    return any(op in getattr(propagator, name, ()) for name in registries)


def mesh_without_ranks(shape: Sequence[int], names: Sequence[str]) -> DeviceMesh:
    """A mesh to ask questions about. No process group is needed, and none is made."""
    ranks = torch.arange(prod(shape)).view(*shape)
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple(names), _init_backend=False, _rank=0)


def propagate(
    op: torch._ops.OpOverload, arguments: Sequence[Any], keywords: dict[str, Any] | None = None
) -> tuple[tuple[DTensorSpec, ...], tuple[DTensorSpec, ...]]:
    """What DTensor's own rules decide about a call: the specs of its tensors as they are used, and of its results.

    Args:
        op: the operator.
        arguments, keywords: positional ones, and others by name, each tensor given as its spec.

    Raises:
        Exception: torch has no rule for the operator, or its rule has no answer.
    """
    schema = OpSchema(op, tuple(arguments), keywords or {})
    sharding = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding_non_cached(schema)
    redistributed = sharding.redistribute_schema if sharding.needs_redistribute else None
    used = [a for a in (redistributed or schema).args_schema if isinstance(a, DTensorSpec)]
    results = sharding.output_spec
    results = [results] if isinstance(results, DTensorSpec) else list(results or ())
    return tuple(used), tuple(r for r in results if r is not None)


def parts_of(t: DTensor) -> list[Tensor]:
    """On simulated ranks, the local tensor of every rank."""
    local = local_of(t)
    assert isinstance(local, LocalTensor)
    return [part for _, part in sorted(local._local_tensors.items())]


def box_at(t: DTensor, place: Sequence[int]) -> Box:
    """Which part of a DTensor lies on the rank at ``place`` in its mesh."""
    return box_within(t.shape, t.device_mesh.shape, tuple(t.placements), tuple(place))


def box_within(
    shape: torch.Size, mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], place: tuple[int, ...]
) -> Box:
    """As :func:`box_at`, of any DTensor of this shape on any mesh of that."""
    sizes, offset = _compute_local_shape_and_global_offset(shape, mesh_shape, list(place), placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))


def group_over_all_axes(mesh: DeviceMesh, name: str) -> dist.ProcessGroup:
    """One group of all ranks of a mesh, its axes taken together. Collective on its first call."""
    return mesh._flatten(name).get_group()


def axes_as_one(mesh: DeviceMesh, axes: Sequence[str], before: Sequence[str] = ()) -> DeviceMesh:
    """The axes ``before`` of a mesh, and then one axis in place of several. Collective on its first call."""
    joined = mesh[tuple(axes)]._flatten("_".join(axes))
    return DeviceMesh._concatenate([mesh[name] for name in before] + [joined]) if before else joined


def group_that_its_ranks_make(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of some ranks. They call this, and no other rank does.

    torch makes the names of groups from how many there have been, and later ones of more ranks want the same name on
    all. So this one does not count.
    """
    count = c10d._world.group_count
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    c10d._world.group_count = count
    assert isinstance(group, dist.ProcessGroup)
    return group


def all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """``send[i]`` rows to rank ``i``, and ``receive[i]`` from it, as a new tensor.

    This and those below are functional, unlike those of ``torch.distributed``: they write into nothing that selective
    checkpointing may have kept, and its policies know them by name.
    """
    return wait(start_all_to_all(x, receive, send, group))


def start_all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """As :func:`all_to_all`, and does not wait: what it returns holds nothing before :func:`wait`."""
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), receive, send, group.group_name)


def wait(x: Tensor) -> Tensor:
    """The same tensor, once it has what a collective brings."""
    return torch.ops._c10d_functional.wait_tensor(x)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, in rank order, one below the other."""
    return wait(start_all_gather(x, group))


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """As :func:`all_gather`, and does not wait: what it returns holds nothing before :func:`wait`."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks."""
    total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


def silence_advice_on_redistribution() -> None:
    """Let torch no longer warn on every rank of redistributions that take more steps than others would."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def peers_store() -> dist.Store:
    """The store through which the ranks found each other, over a connection of its own."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def limit_waits(limit: timedelta) -> None:
    """How long collectives of this process wait for other ranks from now on, in every process group but patient ones.

    torch has no public way to change that. It asks the backends one by one, and some do not have such a limit.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_desc == PATIENT:
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout is now only supported", UserWarning)
            dist.distributed_c10d._set_pg_timeout(limit, group)


def abort_groups() -> None:
    """Let collectives that wait on a device fail, in every process group. Those of gloo do not notice."""
    for group in list(dist.distributed_c10d._world.pg_map):
        # A backend without this says so, and what fails here has failed already.
        with contextlib.suppress(RuntimeError):
            group.abort()


def flight_record() -> str | None:
    """The last collectives of this process as JSON, where torch has recorded them (``TORCH_FR_BUFFER_SIZE``)."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None or not os.environ.get("TORCH_FR_BUFFER_SIZE"):
        return None
    return dump().decode()
