"""Hand a rule to DTensor. The only file that knows DTensor's internals and how its versions differ.

``torch.distributed.tensor.experimental.register_sharding`` is the public way in, but it picks the cheapest of all
combinations of one-axis choices, and cutting a replicated tensor costs nothing: on a 2-D mesh a call whose placements
match one combination exactly can tie with another that is wrong for its sizes. It also leaves arguments before the
first int out of its decision cache. So the strategy is registered one level below, where it names the one combination
itself and all non-tensor arguments are part of the key.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import generate_redistribute_costs

from moesaic.sharding.admission import Call, ShardingError, admit, choices_for
from moesaic.sharding.notation import Notation
from moesaic.sharding.rule import AxisRule, LinearIn, Rule, divides, factor_sizes, make_rule

_RULES: dict[torch._ops.OpOverload, Rule] = {}


def sharding_rule(
    *lines: str,
    linear: Sequence[LinearIn] = (),
    sliced: Sequence[str] = (),
    redistribute: bool = False,
) -> Callable[[Any], Any]:
    """Make an operator DTensor-aware, in one line of einops-like notation.

    The line names the dims of every tensor argument and output by factors (see :mod:`moesaic.sharding.notation`). From
    it follow the placements of one mesh axis: a factor of the output is parallel, a factor of inputs only is summed
    (the output is ``Partial``), ``k!`` stays whole, ``(b c)`` is cut between blocks only. Each axis of an n-D mesh
    takes its own choice. Forward and backward operators each need a rule of their own.

    A call whose placements the rule does not admit raises, naming the nearest admitted ones and the line of code that
    gets there; nothing is gathered silently.

    Args:
        lines: the rule; of several, the first whose patterns fit the shapes of a call speaks for it.
        linear: tensor arguments that the operator is linear in: one that is ``Partial`` makes the outputs ``Partial``.
            A tuple means jointly, as in ``x + y``.
        sliced: tensor arguments that may arrive ``Replicate`` where a shard is wanted, and are cut locally. For
            gradients, whose placement autograd chooses.
        redistribute: allow DTensor to redistribute arguments to the cheapest admitted placements.

    Returns:
        A decorator for a ``torch.library.custom_op``, an ``OpOverload`` or an ``OpOverloadPacket``; it returns the
        operator unchanged.

    Raises:
        NotationError: a line does not parse; the message points at the character.
        ValueError: the rule does not fit the operator's schema.

    Example:
        >>> @moesaic.sharding_rule("m k, k n -> m n", linear=["x", "w"])
        ... @torch.library.custom_op("mylib::my_mm", mutates_args=())
        ... def my_mm(x: Tensor, w: Tensor) -> Tensor: ...

    The notation follows einops and Shardy (OpenXLA); the question is pytorch/torchtitan issue 434.
    """

    def register(op: Any) -> Any:
        overload = _overload(op)
        _check_schema(overload)
        tensors = [a.name for a in overload._schema.arguments if _is_tensor(a.type)]
        rule = make_rule(lines, tensors, linear, sliced)
        if len(rule.lines[0].outputs) != len(overload._schema.returns):
            raise ValueError(
                f"rule '{rule.lines[0]}' has {len(rule.lines[0].outputs)} outputs, "
                f"{overload} returns {len(overload._schema.returns)}"
            )
        _RULES[overload] = rule
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
            overload, _strategy(overload, rule, redistribute), _cache_key(overload)
        )
        return op

    return register


def rule_of(op: Any) -> Rule:
    """The rule an operator was given.

    Raises:
        KeyError: it has none.
    """
    return _RULES[_overload(op)]


def _overload(op: Any) -> torch._ops.OpOverload:
    if isinstance(op, torch._ops.OpOverload):
        return op
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op.default
    if isinstance(op, torch.library.CustomOpDef):
        return op._opoverload
    raise TypeError(f"sharding_rule takes a custom_op, an OpOverload or an OpOverloadPacket, not {type(op).__name__}")


def _check_schema(op: torch._ops.OpOverload) -> None:
    """Refuse what DTensor would get wrong at run time."""
    if op._schema.is_mutable:
        raise ValueError(
            f"{op} mutates an argument; DTensor may mutate a redistributed copy instead: return a new tensor"
        )
    for argument in op._schema.arguments:
        if _holds_tensors(argument.type) and not _is_tensor(argument.type):
            raise ValueError(
                f"{op}: argument '{argument.name}' is a list of tensors; DTensor cannot match its placements"
            )
    for result in op._schema.returns:
        if not isinstance(result.type, torch.TensorType):
            raise ValueError(f"{op} returns {result.type}; a sharding rule needs tensors")


def _holds_tensors(kind: Any) -> bool:
    while isinstance(kind, (torch.OptionalType, torch.ListType)):
        kind = kind.getElementType()
    return isinstance(kind, torch.TensorType)


def _is_tensor(kind: Any) -> bool:
    if isinstance(kind, torch.OptionalType):
        kind = kind.getElementType()
    return isinstance(kind, torch.TensorType)


def _cache_key(op: torch._ops.OpOverload) -> RuntimeSchemaInfo:
    """Make every argument that is not a tensor part of the key of DTensor's decision cache."""
    others = [i for i, a in enumerate(op._schema.arguments) if not _is_tensor(a.type) and not a.kwarg_only]
    keywords = [a.name for a in op._schema.arguments if not _is_tensor(a.type) and a.kwarg_only]
    return RuntimeSchemaInfo(others[0] if others else 100, keywords or None, needs_pytree=True)


def _strategy(op: torch._ops.OpOverload, rule: Rule, redistribute: bool) -> Callable[[OpSchema], OpStrategy]:
    def strategy(schema: OpSchema) -> OpStrategy:
        arguments = _tensor_arguments(op, schema)
        given = [a for a in arguments if a is not None]
        present = tuple(a is not None for a in arguments)
        line, sizes = _line_for(op, rule, schema, arguments)
        mesh = schema.get_mesh_from_args()
        call = Call(
            op=op._name,
            axis_names=mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(mesh.ndim)),
            axis_sizes=tuple(mesh.shape),
            placements=tuple(a.strategies[0].output_spec.placements for a in given),
            present=present,
            sizes=sizes,
        )
        if not redistribute:
            return OpStrategy([_op_spec(mesh, given, admit(rule, line, call))])
        choices = choices_for(rule, line, present)
        combinations = [c for c in product(choices, repeat=mesh.ndim) if divides(line, sizes, c, call.axis_sizes)]
        return OpStrategy([_op_spec(mesh, given, c) for c in combinations])

    return strategy


def _tensor_arguments(op: torch._ops.OpOverload, schema: OpSchema) -> list[OpStrategy | None]:
    """The operator's tensor arguments in schema order; None for an optional one that was not given."""
    found: list[OpStrategy | None] = []
    for i, argument in enumerate(op._schema.arguments):
        if not _is_tensor(argument.type):
            continue
        value = schema.args_schema[i] if i < len(schema.args_schema) else schema.kwargs_schema.get(argument.name)
        found.append(value if isinstance(value, OpStrategy) else None)
    return found


def _line_for(
    op: torch._ops.OpOverload, rule: Rule, schema: OpSchema, arguments: Sequence[OpStrategy | None]
) -> tuple[Notation, dict[str, int]]:
    outputs = _output_shapes(op, schema)
    for line in rule.lines:
        # An argument that was not given has no shape to disagree.
        inputs = [
            tuple(a.tensor_meta.shape) if a is not None and a.tensor_meta is not None else None for a in arguments
        ]
        known = [i for i, shape in enumerate(inputs) if shape is not None]
        given = Notation(line.text, tuple(line.inputs[i] for i in known), line.outputs, line.whole, line.blocks)
        sizes = factor_sizes(given, [s for s in inputs if s is not None], outputs)
        if sizes is not None:
            return line, sizes
    shapes = ", ".join(
        f"{name} {list(a.tensor_meta.shape)}"
        for name, a in zip(rule.tensors, arguments, strict=True)
        if a is not None and a.tensor_meta is not None
    )
    tried = "\n".join(f"  {line}" for line in rule.lines)
    raise ShardingError(f"{op._name}: no line of its rule fits the shapes {shapes} -> {outputs}:\n{tried}")


def _output_shapes(op: torch._ops.OpOverload, schema: OpSchema) -> list[tuple[int, ...]]:
    """Shapes of the results on global shapes, from the operator's own fake kernel."""

    def on_meta(value: object) -> object:
        if not isinstance(value, OpStrategy):
            return value
        meta = value.tensor_meta
        return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")

    args = [on_meta(a) for a in schema.args_schema]
    kwargs = {k: on_meta(v) for k, v in schema.kwargs_schema.items()}
    results = op(*args, **kwargs)
    return [tuple(r.shape) for r in (results if isinstance(results, (tuple, list)) else [results])]


def _op_spec(mesh: Any, arguments: Sequence[OpStrategy], axis_rules: Sequence[AxisRule]) -> OpSpec:
    inputs = [
        DTensorSpec(mesh, tuple(r.inputs[i] for r in axis_rules), tensor_meta=argument.tensor_meta)
        for i, argument in enumerate(arguments)
    ]
    outputs = tuple(
        DTensorSpec(mesh, tuple(r.outputs[i] for r in axis_rules)) for i in range(len(axis_rules[0].outputs))
    )
    return OpSpec(
        output_specs=outputs[0] if len(outputs) == 1 else outputs,
        input_specs=inputs,
        redistribute_cost=[generate_redistribute_costs(a, s) for a, s in zip(arguments, inputs, strict=True)],
    )
