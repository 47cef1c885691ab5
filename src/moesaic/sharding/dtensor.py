"""Run an operator on DTensors by its rule.

A rule is asked once for every combination of placements, shapes and flags; then a call is a look-up, the operator on
the local tensors, and wrapping. ``torch.distributed.tensor.experimental.register_sharding`` is the usual way in, but it
picks the cheapest of all combinations of one-axis choices, and cutting a replicated tensor costs nothing: on a 2-D mesh
a call that matches one combination exactly can tie with another that is wrong for its sizes. Its cache also leaves out
arguments before the first int, runs the fake kernel for every new shape, and loses mutations.
``torch.library.register_torch_dispatch``, public as well, leaves all of this to us.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate

from moesaic.sharding.admission import ShardingError
from moesaic.sharding.decide import RULES, decide, is_tensor
from moesaic.sharding.formula import operators_of_gradient
from moesaic.sharding.internals import (
    DTensorSpec,
    local_of,
    make_spec,
    maybe_run_for_local_tensor,
    meta_of,
    moved,
    redistribute_local_tensor,
    replicates_implicitly,
    spec_of,
    torch_has_rule,
    wrap,
)

# For every operator with a rule, what was decided so far.
_PLANS: dict[torch._ops.OpOverload, dict[Any, "_Plan"]] = {}
_MOST_KEPT = 8192
_NAMESPACES_OF_TORCH = ("aten", "prims", "prim", "_c10d_functional", "c10d")
# Operators and flags with which their gradient is known to call nothing but operators with a rule.
_DIFFERENTIABLE: dict[Any, bool] = {}


@dataclass
class _Plan:
    """What to do in calls with the same placements, shapes and flags.

    Attributes:
        changes: tensors that are redistributed first, each by its number among those given, and where to.
        outputs: specs of the results.
        here: whether this rank is on the mesh. One that is not has empty tensors and computes nothing, as in torch.
        differentiable: whether the gradient was looked at.
    """

    changes: tuple[tuple[int, DTensorSpec], ...]
    outputs: tuple[DTensorSpec, ...]
    here: bool
    differentiable: bool = False


def run_by_rule(op: torch._ops.OpOverload) -> None:
    """Let DTensor run ``op`` by the rule it has in the registry, from now on."""
    if op in _PLANS:  # had another rule before
        _PLANS[op].clear()
        return
    arguments = op._schema.arguments
    positional = [i for i, a in enumerate(arguments) if not a.kwarg_only]
    tensors = [i for i in positional if is_tensor(arguments[i].type)]
    others = [i for i in positional if not is_tensor(arguments[i].type)]
    names = [a.name for a in arguments if is_tensor(a.type)]
    # 1, 1.0 and True are equal, but as Scalars they make results of different dtypes.
    scalars = [i for i in others if isinstance(arguments[i].type, torch.NumberType)]
    plans = _PLANS.setdefault(op, {})

    def run(cls: type, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        given = len(args)
        slots: list[Any] = [i for i in tensors if i < given and args[i] is not None]
        values = [args[i] for i in slots]
        if kwargs:
            keywords = [name for name in names if kwargs.get(name) is not None]
            slots += keywords
            values += [kwargs[name] for name in keywords]
        for value in values:
            if not isinstance(value, DTensor):
                values = _replicate_scalars(op, slots, values)
                break
        key = (*slots, *map(spec_of, values), *[_hashable(args[i]) for i in others if i < given])
        if scalars:
            key = (*key, *[type(args[i]) for i in scalars if i < given])
        if kwargs:
            key = (*key, *[(name, type(value), value) for name, value in kwargs.items() if name not in slots])
        try:
            plan = plans.get(key)
        except TypeError:  # a symbol among the sizes
            plan = _make_plan(op, values, args, kwargs or {})
        if plan is None:
            plan = _make_plan(op, values, args, kwargs or {})
            if not _has_symbols(values):
                _keep(plans, key, plan)
        if not plan.differentiable and any(value.requires_grad for value in values):
            _check_gradient(op, values, args, kwargs or {})
            plan.differentiable = True
        return _call(op, plan, slots, values, args, kwargs)

    torch.library.register_torch_dispatch(op.name(), DTensor, run)


def _hashable(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, list) else argument


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep what was decided. If there is much, the oldest quarter goes: without all of it, a step would decide anew."""
    if len(kept) >= _MOST_KEPT:
        for oldest in list(kept)[: _MOST_KEPT // 4]:
            kept.pop(oldest, None)  # a thread of autograd may have been faster
    kept[key] = value


def _has_symbols(tensors: Sequence[Any]) -> bool:
    return any(type(size) is not int for t in tensors for size in meta_of(spec_of(t)).shape)


def _call(
    op: torch._ops.OpOverload,
    plan: _Plan,
    slots: Sequence[Any],
    tensors: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
) -> Any:
    """Run the operator on this rank's local tensors."""
    locals_ = list(map(local_of, tensors))
    for i, target in plan.changes:
        locals_[i] = _bring(locals_[i], spec_of(tensors[i]), target)
    local_args, local_kwargs = list(args), dict(kwargs or ())
    for slot, local in zip(slots, locals_, strict=True):
        if isinstance(slot, int):
            local_args[slot] = local
        else:
            local_kwargs[slot] = local
    results = op(*local_args, **local_kwargs) if plan.here else _nothing(plan, locals_[0].device)
    if isinstance(results, Tensor):
        return wrap(results, plan.outputs[0])
    return tuple(wrap(r, spec) for r, spec in zip(results, plan.outputs, strict=True))


def _bring(local: Tensor, spec: DTensorSpec, target: DTensorSpec) -> Tensor:
    """Redistribute a tensor, given as this rank's part of it."""
    pairs = list(zip(spec.placements, target.placements, strict=True))
    counted_once = [axis for axis, (a, w) in enumerate(pairs) if a.is_replicate() and isinstance(w, Partial)]
    if counted_once:
        local = _keep_on_first(local, *[spec.mesh.get_local_rank(axis) for axis in counted_once])
        placements = tuple(w if axis in counted_once else a for axis, (a, w) in enumerate(pairs))
        spec = moved(spec, placements)
    return redistribute_local_tensor(local, spec, target)


@maybe_run_for_local_tensor  # where ranks are simulated, for each of them
def _keep_on_first(term: Tensor, *coordinates: int) -> Tensor:
    # torch would divide it by the number of ranks, which rounds, and makes floats of integers.
    return torch.zeros_like(term) if any(coordinates) else term


def _nothing(plan: _Plan, device: torch.device) -> Any:
    results = tuple(torch.empty(0, dtype=meta_of(spec).dtype, device=device) for spec in plan.outputs)
    return results[0] if len(results) == 1 else results


def _replicate_scalars(op: torch._ops.OpOverload, slots: Sequence[int | str], tensors: Sequence[Any]) -> list[Any]:
    """Make DTensors of all tensors. A plain one counts as replicated if it is a scalar, or if the user allowed it."""
    mesh = next(t for t in tensors if isinstance(t, DTensor)).device_mesh
    replicated = []
    for slot, t in zip(slots, tensors, strict=True):
        if not isinstance(t, DTensor):
            t = t if isinstance(t, Tensor) else torch.tensor(t)  # a Python number, as in `x + 1`
            if t.ndim and not replicates_implicitly():
                name = op._schema.arguments[slot].name if isinstance(slot, int) else slot
                raise ShardingError(
                    f"{op._name}: {name} is a plain tensor, but other arguments are DTensors. If it is the same on "
                    f"every rank:\n  {name} = DTensor.from_local({name}, mesh, [Replicate()] * mesh.ndim)\n"
                    "If every rank has a part of it, say which with the placements."
                )
            t = wrap(t, make_spec(mesh, (Replicate(),) * mesh.ndim, t))
        replicated.append(t)
    return replicated


def _check_gradient(op: torch._ops.OpOverload, tensors: Sequence[Any], args: Sequence[Any], kwargs: Any) -> None:
    """Raise unless the gradient of ``op`` can be computed on DTensors: now, and not after the forward pass."""
    if _has_symbols(tensors):
        return
    flags = [*args, *kwargs.values()]
    call = (op, *[(type(flag), _hashable(flag)) for flag in flags if not isinstance(flag, Tensor)])
    if call in _DIFFERENTIABLE:
        return
    for called in operators_of_gradient(op, args, kwargs):
        if called.namespace not in _NAMESPACES_OF_TORCH and called not in RULES and not torch_has_rule(called):
            raise ShardingError(
                f"{op._name}: its gradient calls {called._name}, which has no sharding rule; give it one:\n"
                f"  sharding_rule(...)(torch.ops.{called})"
            )
    _keep(_DIFFERENTIABLE, call, True)


def _make_plan(op: torch._ops.OpOverload, tensors: Sequence[Any], args: Sequence[Any], kwargs: Any) -> _Plan:
    mesh = _common_mesh(op, tensors)
    names = mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(mesh.ndim))
    given = [tuple(t.placements) for t in tensors]
    decision = decide(op, args, given, dict(zip(names, mesh.shape, strict=True)), kwargs)
    changes = [
        (i, moved(spec_of(tensors[i]), target))
        for i, (actual, target) in enumerate(zip(given, decision.inputs, strict=True))
        if actual != target
    ]
    outputs = [
        make_spec(mesh, placements, result)
        for placements, result in zip(decision.outputs, decision.results, strict=True)
    ]
    return _Plan(tuple(changes), tuple(outputs), mesh.get_coordinate() is not None)


def _common_mesh(op: torch._ops.OpOverload, tensors: Sequence[Any]) -> DeviceMesh:
    mesh = tensors[0].device_mesh
    for t in tensors:
        if t.device_mesh != mesh:
            raise ShardingError(f"{op._name}: its tensors are on two meshes, {mesh} and {t.device_mesh}; use one")
    return mesh
