"""Run an operator on DTensors by its rule. The only file that knows DTensor's internals.

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
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._redistribute import redistribute_local_tensor
from torch.distributed.tensor.placement_types import Replicate

from moesaic.sharding.admission import ShardingError
from moesaic.sharding.decide import RULES, decide, is_tensor
from moesaic.sharding.formula import operators_of_gradient

_PLANS: dict[Any, "_Plan"] = {}
_MAX_PLANS = 8192
_NAMESPACES_OF_TORCH = ("aten", "prims", "prim", "_c10d_functional", "c10d")
# Operators whose gradient is known to call nothing but operators with a rule.
_DIFFERENTIABLE: set[torch._ops.OpOverload] = set()


@dataclass(frozen=True)
class _Plan:
    """What a call comes to.

    Attributes:
        changes: tensor arguments that are brought to another place first, by their number among those given.
        outputs: what the results are.
        here: whether this rank is on the mesh. One that is not has empty tensors and computes nothing, as in torch.
    """

    changes: tuple[tuple[int, DTensorSpec], ...]
    outputs: tuple[DTensorSpec, ...]
    here: bool


@dataclass(frozen=True)
class _Signature:
    """Where an operator's tensor arguments stand, and the others, which are part of what a decision is kept by."""

    op: torch._ops.OpOverload
    tensors: tuple[int, ...]
    others: tuple[int, ...]
    keywords: tuple[str, ...]


def dispatch_by_rule(op: torch._ops.OpOverload) -> None:
    """Let DTensor run ``op`` by the rule it has in the registry."""
    arguments = op._schema.arguments
    positional = [i for i, a in enumerate(arguments) if not a.kwarg_only]
    signature = _Signature(
        op,
        tuple(i for i in positional if is_tensor(arguments[i].type)),
        tuple(i for i in positional if not is_tensor(arguments[i].type)),
        tuple(a.name for a in arguments if is_tensor(a.type)),
    )

    def run(cls: type, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        return _run(signature, args, kwargs or {})

    torch.library.register_torch_dispatch(op.name(), DTensor, run)


def _run(signature: _Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    op, given = signature.op, len(args)
    slots: list[int | str] = [i for i in signature.tensors if i < given and args[i] is not None]
    if kwargs:
        slots += [name for name in signature.keywords if kwargs.get(name) is not None]
    tensors = [args[slot] if isinstance(slot, int) else kwargs[slot] for slot in slots]
    for t in tensors:
        if not isinstance(t, DTensor):
            tensors = _replicate_scalars(op, slots, tensors)
            break
    key: list[Any] = [op, *slots]
    for t in tensors:
        spec = t._spec
        key += (spec.mesh, spec.placements, spec.tensor_meta.shape)
    key += [args[i] for i in signature.others if i < given]
    if kwargs:
        key += [pair for pair in kwargs.items() if pair[0] not in slots]
    plan = _plan(tuple(key), op, tensors, args, kwargs)
    locals_ = [t._local_tensor for t in tensors]
    for i, target in plan.changes:
        locals_[i] = redistribute_local_tensor(locals_[i], tensors[i]._spec, target)
    local_args: list[Any] = list(args)
    local_kwargs = dict(kwargs)
    for slot, local in zip(slots, locals_, strict=True):
        if isinstance(slot, int):
            local_args[slot] = local
        else:
            local_kwargs[slot] = local
    results = op(*local_args, **local_kwargs) if plan.here else _nothing(plan, locals_[0].device)
    if isinstance(results, Tensor):
        return DTensor(results, plan.outputs[0], requires_grad=False)
    return tuple(DTensor(r, spec, requires_grad=False) for r, spec in zip(results, plan.outputs, strict=True))


def _nothing(plan: _Plan, device: torch.device) -> Any:
    results = tuple(torch.empty(0, dtype=_meta(spec).dtype, device=device) for spec in plan.outputs)
    return results[0] if len(results) == 1 else results


def _meta(spec: DTensorSpec) -> TensorMeta:
    assert spec.tensor_meta is not None
    return spec.tensor_meta


def _replicate_scalars(op: torch._ops.OpOverload, slots: Sequence[int | str], tensors: Sequence[Any]) -> list[Any]:
    """DTensors of all tensors: a plain one counts as replicated if it is a scalar or the user allowed it."""
    mesh = next(t for t in tensors if isinstance(t, DTensor))._spec.mesh
    replicated = []
    for slot, t in zip(slots, tensors, strict=True):
        if not isinstance(t, DTensor):
            if t.ndim and not DTensor._op_dispatcher._allow_implicit_replication:
                name = op._schema.arguments[slot].name if isinstance(slot, int) else slot
                raise ShardingError(
                    f"{op._name}: {name} is a plain tensor, but other arguments are DTensors. If it is the same on "
                    f"every rank:\n  {name} = DTensor.from_local({name}, mesh, [Replicate()] * mesh.ndim)\n"
                    "If every rank has a part of it, say which with the placements."
                )
            spec = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=TensorMeta(t.shape, t.stride(), t.dtype))
            t = DTensor(t, spec, requires_grad=False)
        replicated.append(t)
    return replicated


def _plan(key: Any, op: torch._ops.OpOverload, tensors: Sequence[Any], args: Sequence[Any], kwargs: Any) -> _Plan:
    """Looked up, or made and kept. Sizes that are symbols while compiling are not kept."""
    try:
        plan = _PLANS.get(key)
    except TypeError:  # a list among the arguments, or a symbol
        return _make_plan(op, tensors, args, kwargs)
    if plan is None:
        plan = _make_plan(op, tensors, args, kwargs)
        if all(type(size) is int for t in tensors for size in t._spec.tensor_meta.shape):
            _check_gradient(op, args, kwargs)
            if len(_PLANS) >= _MAX_PLANS:
                _PLANS.clear()
            _PLANS[key] = plan
    return plan


def _check_gradient(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Any) -> None:
    """Raise unless the gradient of ``op`` can be computed on DTensors: now, and not after the forward pass."""
    if op in _DIFFERENTIABLE:
        return
    for called in operators_of_gradient(op, args, kwargs):
        if called.namespace not in _NAMESPACES_OF_TORCH and not _has_rule(called):
            raise ShardingError(
                f"{op._name}: its gradient calls {called._name}, which has no sharding rule; give it one:\n"
                f"  sharding_rule(...)(torch.ops.{called})"
            )
    _DIFFERENTIABLE.add(op)


def _has_rule(op: torch._ops.OpOverload) -> bool:
    propagator = DTensor._op_dispatcher.sharding_propagator
    registries = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")  # the second since torch 2.12
    return op in RULES or any(op in getattr(propagator, name, ()) for name in registries)


def _make_plan(op: torch._ops.OpOverload, tensors: Sequence[Any], args: Sequence[Any], kwargs: Any) -> _Plan:
    mesh = _common_mesh(op, tensors)
    names = mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(mesh.ndim))
    given = [tuple(t._spec.placements) for t in tensors]
    decision = decide(op, args, given, dict(zip(names, mesh.shape, strict=True)), kwargs)
    changes = [
        (i, DTensorSpec(mesh, target, tensor_meta=tensors[i]._spec.tensor_meta))
        for i, (actual, target) in enumerate(zip(given, decision.inputs, strict=True))
        if actual != target
    ]
    outputs = [
        DTensorSpec(mesh, placements, tensor_meta=TensorMeta(result.shape, result.stride(), result.dtype))
        for placements, result in zip(decision.outputs, decision.results, strict=True)
    ]
    return _Plan(tuple(changes), tuple(outputs), mesh.get_coordinate() is not None)


def _common_mesh(op: torch._ops.OpOverload, tensors: Sequence[Any]) -> DeviceMesh:
    mesh = tensors[0]._spec.mesh
    for t in tensors:
        if t._spec.mesh != mesh:
            raise ShardingError(f"{op._name}: its tensors are on two meshes, {mesh} and {t._spec.mesh}; use one")
    return mesh
