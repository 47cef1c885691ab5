"""``sharding_rule``: the one line that makes an operator DTensor-aware."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from moesaic.sharding.decide import RULES, is_tensor, overload_of
from moesaic.sharding.dtensor import run_by_rule
from moesaic.sharding.rule import Joint, make_rule
from moesaic.sharding.when import When, conditions

Operator = TypeVar("Operator")


def sharding_rule(
    *lines: str,
    linear: Sequence[Joint] = (),
    preserves: Mapping[str, Sequence[Joint]] | None = None,
    redistribute: bool | Sequence[str] = False,
    when: When | None = None,
    at_least: Mapping[str, int] | None = None,
) -> Callable[[Operator], Operator]:
    """Make an operator DTensor-aware, in one line of einops-like notation.

    The line names the dims of every tensor argument and output by factors (see :mod:`moesaic.sharding.notation`). From
    it follow the placements of one mesh axis: a factor of the output is parallel, a factor of inputs only is summed
    (the output is ``Partial``), ``k!`` stays whole, ``(b c)`` is cut between blocks only. Each axis of an n-D mesh
    takes its own choice. Forward and backward operators each need a rule of their own.

    At its first call on DTensors that need a gradient, and for every new combination of flags, the operator's gradient
    is traced without values; a custom operator in it that has no rule is an error there and then.

    A call whose placements the rule does not admit raises. The error names the nearest admitted placements and the line
    of code that gets there. Nothing is gathered silently.

    Args:
        lines: the rule; of several, the first whose patterns fit the shapes of a call speaks for it.
        linear: tensor arguments that the operator is linear in: one that is ``Partial`` makes the outputs ``Partial``,
            sums and means alike. A tuple means jointly, as in ``x + y``.
        preserves: for a reduction, tensor arguments ``x`` with ``f(max(x1, x2)) = max(f(x1), f(x2))``:
            ``preserves={"max": ["x"]}`` passes ``Partial("max")`` through.
        redistribute: tensor arguments that DTensor may bring to the nearest admitted placements: cut where they are
            replicated, else with a collective. For gradients, whose placement autograd chooses. ``True`` means all.
        when: the values of flags that the rule stands for: ``when={"dim": 1}``, or ``{"dim": [1, -1]}`` for several (a
            list of lists where the flag is a list itself). Of an optional tensor, ``None`` means calls without it and
            ``torch.Tensor`` calls with it. A list of mappings has one for each line. Any other call raises.
        at_least: factors of which every rank has to have so much where they are cut, such as ``{"m": 16}`` for a kernel
            that takes no fewer rows. It is decided by global sizes.

    Returns:
        A decorator for a ``torch.library.custom_op`` or ``triton_op``, an ``OpOverload`` (one of torch's own too, whose
        rule it replaces) or an ``OpOverloadPacket``; it returns the operator unchanged.

    Raises:
        NotationError: a line does not parse; the message points at the character.
        ValueError: the rule does not fit the operator's schema, ``when`` names no flag or no value
            of it, or ``at_least`` no factor.

    Example:
        >>> @moesaic.sharding_rule("m k, k n -> m n", linear=["x", "w"])
        ... @torch.library.custom_op("mylib::my_mm", mutates_args=())
        ... def my_mm(x: Tensor, w: Tensor) -> Tensor: ...

    The notation follows einops and Shardy (OpenXLA); the question is pytorch/torchtitan issue 434.
    """

    def register(op: Operator) -> Operator:
        overload = overload_of(op)
        _check_schema(overload)
        tensors = [a.name for a in overload._schema.arguments if is_tensor(a.type)]
        results = [r.name or f"out{i}" for i, r in enumerate(overload._schema.returns)]
        RULES[overload] = make_rule(
            lines,
            tensors,
            results,
            linear=linear,
            preserves=preserves,
            redistribute=redistribute,
            when=conditions(overload, when or {}, len(lines)),
            at_least=at_least,
        )
        run_by_rule(overload)
        return op

    return register


def _check_schema(op: torch._ops.OpOverload) -> None:
    """Refuse what would go wrong at run time."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
        raise ValueError(f"{op} is made of other operators. DTensor sees only those, so give them the rules")
    if op._schema.is_mutable:
        raise ValueError(
            f"{op} mutates an argument; DTensor may mutate a redistributed copy instead: return a new tensor"
        )
    for argument in op._schema.arguments:
        if _holds_tensors(argument.type) and not is_tensor(argument.type):
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
