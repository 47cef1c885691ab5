"""experts_lora in plain PyTorch. This file is the definition, and the oracle of every test.

The experts of ``experts_mlp`` with the weights ``w + a b``. So the gradients of the factors follow from that of the
sum: ``ga = gw b^T`` and ``gb = a^T gw``.

Legend: T tokens, K copies a token (top-k), D model dim.
"""

from torch import Tensor

from moesaic.ops.experts_lora.problem import Adapted, FactorGradients, Gradients, LowRank, Wanted
from moesaic.ops.experts_mlp.impl import reference
from moesaic.ops.experts_mlp.problem import Forward, Problem, Projection, Target, Targets
from moesaic.ops.experts_mlp.problem import Wanted as BaseWanted
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.quantized.weight import decoded


def forward(adapted: Adapted, save: bool, impl: str | None) -> Forward:
    return reference.forward(_summed(adapted), save)


def backward(grad_TD: Tensor, adapted: Adapted, pre: tuple[Tensor, ...], wanted: Wanted, impl: str | None) -> Gradients:
    problem = _summed(adapted)
    up = tuple(_targets(p, factors) for p, factors in zip(problem.projections, adapted.up, strict=True))
    down = _targets(problem.down, adapted.down)
    found = reference.backward(grad_TD, problem, pre, BaseWanted(wanted.x, wanted.weights, up, down))
    of_up = tuple(_of_factors(target, factors) for target, factors in zip(up, adapted.up, strict=True))
    return Gradients(found.x_TD, found.weights_TK, of_up, _of_factors(down, adapted.down))


def _summed(adapted: Adapted) -> Problem:
    base = adapted.base
    up = tuple(_add(projection, factors) for projection, factors in zip(base.projections, adapted.up, strict=True))
    return base._replace(projections=up, down=_add(base.down, adapted.down))


def _add(projection: Projection, factors: LowRank | None) -> Projection:
    if factors is None:
        return projection
    acc = accumulation_dtype(projection.weight.dtype)
    total = decoded(projection.weight).to(acc) + factors.a.to(acc) @ factors.b.to(acc)
    return projection._replace(weight=total.to(projection.weight.dtype))


def _targets(projection: Projection, factors: LowRank | None) -> Targets:
    """Where the gradient of the sum goes, which those of the factors are made of."""
    weight = projection.weight
    return Targets(Target(weight) if factors is not None and isinstance(weight, Tensor) else None, None)


def _of_factors(targets: Targets, factors: LowRank | None) -> FactorGradients | None:
    if factors is None or targets.weight is None:
        return None
    gw = targets.weight.memory()
    acc = accumulation_dtype(gw.dtype)
    ga, gb = gw.to(acc) @ factors.b.to(acc).mT, factors.a.to(acc).mT @ gw.to(acc)
    return FactorGradients(ga.to(gw.dtype), gb.to(gw.dtype))
