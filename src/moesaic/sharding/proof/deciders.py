"""Who says where the tensors of a call lie: a rule of ours, or DTensor's own propagation."""

from collections.abc import Callable, Sequence

import torch
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from moesaic.sharding.admission import Decision, ShardingError
from moesaic.sharding.decide import RULES, admits, as_called, fitting_line
from moesaic.sharding.internals import make_spec, mesh_without_ranks, propagate
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


def is_private(placements: Sequence[Placements]) -> bool:
    """Whether one of them is of a kind that only torch's dispatch of an operator knows, such as ``_MaskPartial``."""
    return any(type(p) not in (Replicate, Shard, Partial) for of_tensor in placements for p in of_tensor)


def _names(mesh: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"axis{i}" for i in range(len(mesh)))


def _by_rule(example: Example, placements: Sequence[Placements], mesh: Sequence[int]) -> Decision | None:
    # Narrower examples share what is kept.
    key = ("line", example.shapes)
    if key not in example.fakes:
        try:
            example.fakes[key] = fitting_line(example.op, *example.call)
        except ShardingError:
            example.fakes[key] = None
    fitting = example.fakes[key]
    return fitting and admits(example.op, fitting, placements, dict(zip(_names(mesh), mesh, strict=True)))


def _by_torch(example: Example, placements: Sequence[Placements], mesh: Sequence[int]) -> Decision | None:
    device_mesh = mesh_without_ranks(mesh, _names(mesh))
    specs = [make_spec(device_mesh, p, t) for t, p in zip(example.tensors, placements, strict=True)]
    try:
        used, results = propagate(example.op, *as_called(example.op, example.arguments(specs)))
    except Exception:
        return None  # torch has no rule, or its rule has no answer
    return Decision(tuple(s.placements for s in used), tuple(s.placements for s in results))
