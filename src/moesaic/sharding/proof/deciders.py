"""Who says where the tensors of a call lie: a rule of ours, or DTensor's own propagation."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor.placement_types import Partial

from moesaic.sharding.admission import Decision
from moesaic.sharding.decide import RULES, admits
from moesaic.sharding.proof.examples import Example
from moesaic.sharding.rule import Placements

Decider = Callable[[Example, Sequence[Placements], Sequence[int]], Decision | None]


def decider_of(op: torch._ops.OpOverload) -> Decider:
    """By the rule the operator was given, or by torch's own."""
    return _by_rule if op in RULES else _by_torch


def is_local(given: Sequence[Placements], decided: Sequence[Placements]) -> bool:
    """Whether tensors come from the given to the decided placements without communication."""
    return all(
        a == b or (a.is_replicate() and (isinstance(b, Partial) or b not in before[axis + 1 :]))
        for before, after in zip(given, decided, strict=True)
        for axis, (a, b) in enumerate(zip(before, after, strict=True))
    )


def _names(mesh: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"axis{i}" for i in range(len(mesh)))


def _by_rule(example: Example, placements: Sequence[Placements], mesh: Sequence[int]) -> Decision | None:
    return admits(example.op, example.args, placements, dict(zip(_names(mesh), mesh, strict=True)))


def _by_torch(example: Example, placements: Sequence[Placements], mesh: Sequence[int]) -> Decision | None:
    ranks = torch.arange(prod(mesh)).view(*mesh)
    device_mesh = DeviceMesh("cpu", ranks, mesh_dim_names=_names(mesh), _init_backend=False, _rank=0)

    def spec(t: Tensor, p: Placements) -> DTensorSpec:
        return DTensorSpec(device_mesh, p, tensor_meta=TensorMeta(t.shape, t.stride(), t.dtype))

    specs = [spec(t, p) for t, p in zip(example.tensors, placements, strict=True)]
    schema = OpSchema(example.op, example.arguments(specs), {})
    try:
        sharding = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding_non_cached(schema)
    except Exception:
        return None  # torch has no rule, or its rule has no answer
    redistributed = sharding.redistribute_schema if sharding.needs_redistribute else None
    used = [a for a in (redistributed or schema).args_schema if isinstance(a, DTensorSpec)]
    outputs = sharding.output_spec
    outputs = [outputs] if isinstance(outputs, DTensorSpec) else list(outputs or ())
    return Decision(tuple(s.placements for s in used), tuple(s.placements for s in outputs if s is not None))
