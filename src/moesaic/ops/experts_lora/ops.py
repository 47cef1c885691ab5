"""torch.library definitions of experts_lora: operators, fakes and gradients, made as those of experts_mlp.

The weights and biases are frozen, so there are gradients of the tokens, the routing weights and the factors only.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import no_autocast
from moesaic.ops.experts_lora.impl import reference, rows
from moesaic.ops.experts_lora.operands import FACTORS, INDICES, NAMES, SCHEMA, WITH_GRADIENT, named
from moesaic.ops.experts_lora.problem import Adapted, Wanted, adapted, by_factor
from moesaic.ops.experts_mlp.definitions import (
    AGAIN,
    fake_inference,
    fake_results,
    like_x,
    register_gradients,
    results,
    to_lines,
    with_copies,
    zeros,
)
from moesaic.ops.experts_mlp.operands import COPIES, Given, check_operands

_FLAGS = "str activation, str? impl, float dropout"
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in WITH_GRADIENT)
torch.library.define("moesaic::experts_lora", f"({SCHEMA}, {_FLAGS}, {COPIES}) -> (Tensor z, Tensor h1, Tensor h3)")
torch.library.define("moesaic::experts_lora_inference", f"({SCHEMA}, {_FLAGS}, {COPIES}) -> Tensor")
torch.library.define(
    "moesaic::experts_lora_backward",
    f"(Tensor grad, {SCHEMA}, Tensor h1, Tensor h3, {_FLAGS}, bool[] needs, {COPIES}) -> ({_GRADIENTS})",
)


def module_of(impl: str | None, problem: Adapted) -> Any:
    """What computes it. A sum of weights, which the reference makes, has no place for a mask."""
    return reference if impl == "reference" and problem.dropout is None else rows


@torch.library.impl("moesaic::experts_lora", "default")
def _forward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, activation, impl, dropout, copies = with_copies(args, len(NAMES) + 4)
    given = named(tuple(tensors))
    x = given["x"]
    check_operands("experts_lora", given, activation, factors=FACTORS, indices=INDICES, copies=copies)
    problem = adapted(given, activation, dropout, copies)
    with no_autocast(x.device.type):
        z_TD, kept = module_of(impl, problem).forward(problem, save=True, impl=impl)
    return results(z_TD, kept, x, given["ids"], copies)


@torch.library.impl("moesaic::experts_lora_inference", "default")
def _inference(*args: Any) -> Tensor:
    *tensors, activation, impl, dropout, copies = with_copies(args, len(NAMES) + 4)
    given = named(tuple(tensors))
    x = given["x"]
    check_operands("experts_lora_inference", given, activation, factors=FACTORS, indices=INDICES, copies=copies)
    problem = adapted(given, activation, dropout, copies)
    with no_autocast(x.device.type):
        return like_x(module_of(impl, problem).forward(problem, save=False, impl=impl).z_TD, x)


@torch.library.impl("moesaic::experts_lora_backward", "default")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, h1, h3, activation, impl, dropout, needs, copies = with_copies(args, len(NAMES) + 7)
    given, beside = named(tuple(operands)), {"grad": grad, "h1": h1, "h3": h3}
    check_operands("experts_lora_backward", given, activation, beside, factors=FACTORS, indices=INDICES, copies=copies)
    problem = adapted(given, activation, dropout, copies)
    pre = tuple(to_lines(h) for h in (h1, h3)[: len(problem.up)])
    with no_autocast(grad.device.type):
        found = module_of(impl, problem).backward(
            grad.flatten(0, 1), problem, pre, Wanted(needs[0], needs[1], any(needs[2:])), impl
        )
    of = {"x": found.x_TD, "weights": found.weights_TK} | by_factor(found)
    wanted = {name: t if needed else None for (name, t), needed in zip(of.items(), needs, strict=True)}
    return in_order(given, wanted, h1)


def in_order(given: Given, found: Mapping[str, Tensor | None], h1: Tensor) -> tuple[Tensor, ...]:
    """The gradients of all operands that have one, in their shapes; of those that were not found, zeros.

    A factor that is not given has rank 0.
    """
    x, w1 = given["x"], given["w1"]
    assert x is not None
    assert w1 is not None
    sizes = {"W": w1.shape[0], "D": x.shape[-1], "F": h1.shape[-1]}
    of = {factor.name: tuple(sizes.get(dim, 0) for dim in factor.dims.split()) for factor in FACTORS}
    gradients = []
    for name in WITH_GRADIENT:
        t, like = found[name], given[name]
        shape = of[name] if like is None else like.shape
        gradients.append(zeros(x if like is None else like, shape) if t is None else t.reshape(shape))
    return tuple(gradients)


@torch.library.register_fake("moesaic::experts_lora")
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, _, copies = with_copies(args, len(NAMES) + 4)
    given = named(tuple(tensors))
    return fake_results(given["x"], given["ids"], given["w3"], given["w1"].shape[2], copies)


torch.library.register_fake("moesaic::experts_lora_inference", fake_inference)


@torch.library.register_fake("moesaic::experts_lora_backward")
def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, _, _, _, _, needs, _ = with_copies(args, len(NAMES) + 7)
    given = named(tuple(tensors))
    found = {
        name: t.new_empty(t.shape) if needed and (t := given[name]) is not None else None
        for name, needed in zip(WITH_GRADIENT, needs, strict=True)
    }
    return in_order(given, found, h1)


register_gradients(
    "experts_lora",
    NAMES,
    WITH_GRADIENT,
    of_inference="experts_lora_inference keeps nothing to differentiate with; call experts_lora",
    of_backward=f"experts_lora has no second derivative; {AGAIN}",
)
