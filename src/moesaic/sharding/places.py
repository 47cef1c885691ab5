"""From a rule to a plan: where every tensor of an operator lies on a mesh whose axes each cut one factor."""

from typing import Any

from torch.distributed.tensor.placement_types import Replicate

from moesaic.sharding.decide import rule_of
from moesaic.sharding.notation import Notation
from moesaic.sharding.rule import Placements, Rule


def on(operator: Any, **axes: str) -> dict[str, Placements]:
    """Where the arguments and results of an operator lie on a mesh, by name.

    The operator that computes its gradient has a rule as well. The two together are a plan for training: where weights
    are kept, and where the gradient of each arrives.

    A term that is added to the result (``+n`` in the rule) is cut as its dims say and else replicated; the operator
    counts it once.

    Args:
        operator: an operator that has a sharding rule, or the rule.
        axes: for each mesh axis, in the order of the mesh, the factor that it cuts.

    Returns:
        A placement for each axis, by the names of arguments and results in the operator's schema. Results without a
        name are ``out0``, ``out1``, ...

    Raises:
        KeyError: the operator has no rule.
        ValueError: no line of the rule lets all these factors be cut.

    Example:
        >>> on(torch.ops.moesaic.grouped_mm, ep="b", etp="n")["w"]
        (Shard(dim=0), Shard(dim=2))
    """
    rule = operator if isinstance(operator, Rule) else rule_of(operator)
    line = _line_with(rule, tuple(axes.values()))
    choices = [rule.sharded(line, factor) for factor in axes.values()]
    places = {name: tuple(c.inputs[i] for c in choices) for i, name in enumerate(rule.tensors)}
    for name in rule.terms(line):
        places[name] = tuple(Replicate() if p.is_partial() else p for p in places[name])
    return places | {name: tuple(c.outputs[i] for c in choices) for i, name in enumerate(rule.results)}


def _line_with(rule: Rule, factors: tuple[str, ...]) -> Notation:
    line = next((line for line in rule.lines if {*factors} <= {*line.shardable}), None)
    if line is None:
        lines = "\n".join(f"  {line}  (cuts {', '.join(line.shardable) or 'nothing'})" for line in rule.lines)
        raise ValueError(f"no line of the rule lets {' and '.join(factors)} be cut:\n{lines}")
    return line
