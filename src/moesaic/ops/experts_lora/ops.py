"""torch.library definitions of experts_lora: operators, fakes and gradients, made as those of experts_mlp.

The weights and biases are frozen, so there are gradients of the tokens, the routing weights and the factors only.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import no_autocast
from moesaic.ops.experts_lora.impl import reference, rows
from moesaic.ops.experts_lora.operands import FACTORS, NAMES, SCHEMA, WITH_GRADIENT, by_name, named, shape_of
from moesaic.ops.experts_lora.problem import Wanted, adapted, by_factor
from moesaic.ops.experts_mlp.operands import Given, check_operands
from moesaic.ops.grouped_mm.implementations import Implementation

_FLAGS = "str activation, str? impl"
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in WITH_GRADIENT)
torch.library.define("moesaic::experts_lora", f"({SCHEMA}, {_FLAGS}) -> (Tensor z, Tensor h1, Tensor h3)")
torch.library.define("moesaic::experts_lora_inference", f"({SCHEMA}, {_FLAGS}) -> Tensor")
torch.library.define(
    "moesaic::experts_lora_backward",
    f"(Tensor grad, {SCHEMA}, Tensor h1, Tensor h3, {_FLAGS}, bool[] needs) -> ({_GRADIENTS})",
)


def _module(impl: Implementation | None) -> Any:
    return reference if impl == "reference" else rows


@torch.library.impl("moesaic::experts_lora", "default")
def _forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, activation, impl = args
    given = named((x, *tensors))
    check_operands("experts_lora", given, activation, factors=FACTORS)
    problem = adapted(given, activation)
    with no_autocast(x.device.type):
        z_TD, kept = _module(impl).forward(problem, save=True, impl=impl)
    pre = [h_TKF.unflatten(0, x.shape[:2]) for h_TKF in kept]
    return _like(z_TD, x), *pre, *(_zeros(pre[0], pre[0].shape) for _ in range(2 - len(pre)))


@torch.library.impl("moesaic::experts_lora_inference", "default")
def _inference(x: Tensor, *args: Any) -> Tensor:
    *tensors, activation, impl = args
    given = named((x, *tensors))
    check_operands("experts_lora_inference", given, activation, factors=FACTORS)
    problem = adapted(given, activation)
    with no_autocast(x.device.type):
        return _like(_module(impl).forward(problem, save=False, impl=impl).z_TD, x)


@torch.library.impl("moesaic::experts_lora_backward", "default")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, h1, h3, activation, impl, needs = args
    given = named(tuple(operands))
    check_operands("experts_lora_backward", given, activation, {"grad": grad, "h1": h1, "h3": h3}, factors=FACTORS)
    problem = adapted(given, activation)
    pre = tuple(h.flatten(0, 1) for h in (h1, h3)[: len(problem.up)])
    wanted = Wanted(needs[0], needs[1], any(needs[2:]))
    with no_autocast(grad.device.type):
        found = _module(impl).backward(grad.flatten(0, 1), problem, pre, wanted, impl)
    of = {"x": found.x_TD, "weights": found.weights_TK} | by_factor(found)
    return _in_order(given, {name: t if needed else None for (name, t), needed in zip(of.items(), needs, strict=True)})


def _in_order(given: Given, found: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients of all operands that have one, in their shapes; of those that were not found, zeros."""
    x = given["x"]
    assert x is not None
    results = []
    for name in ("x", "weights"):
        t, like = found[name], given[name]
        assert like is not None
        results.append(_zeros(like, like.shape) if t is None else t.reshape(like.shape))
    for factor in FACTORS:
        t, like = found[factor.name], given[factor.name]
        results.append(_zeros(x if like is None else like, shape_of(factor, given)) if t is None else t)
    return tuple(results)


def _zeros(like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Zeros without memory, in the place of what is not given or not wanted."""
    return like.new_zeros(1).expand(shape)


def _like(z_TD: Tensor, x: Tensor) -> Tensor:
    # Not a view: an in-place operation on a view of what an operator made is an error.
    return torch.ops.aten._unsafe_view(z_TD, x.shape)


@torch.library.register_fake("moesaic::experts_lora")
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    given = named(args[: len(NAMES)])
    x, ids, w1 = given["x"], given["ids"], given["w1"]
    h1 = x.new_empty(*ids.shape, w1.shape[2])
    return x.new_empty(x.shape), h1, _zeros(h1, h1.shape) if given["w3"] is None else torch.empty_like(h1)


@torch.library.register_fake("moesaic::experts_lora_inference")
def _inference_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("moesaic::experts_lora_backward")
def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    given, needs = named(args[: len(NAMES)]), args[-1]
    found = {
        name: t.new_empty(t.shape) if needed and (t := given[name]) is not None else None
        for name, needed in zip(WITH_GRADIENT, needs, strict=True)
    }
    return _in_order(given, found)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.impl = inputs
    _, *pre = output
    # Nothing is differentiated through the pre-activations: no zeros of their size in the place of a gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*pre)
    ctx.save_for_backward(*tensors, *pre)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    flags = (None, None)
    if grad is None:
        return (*[None] * len(NAMES), *flags)
    of = dict(zip(NAMES, ctx.needs_input_grad, strict=False))
    needs = [of[name] for name in WITH_GRADIENT]
    found = torch.ops.moesaic.experts_lora_backward(grad, *ctx.saved_tensors, ctx.activation, ctx.impl, needs)
    return (*by_name(tuple(t if needed else None for t, needed in zip(found, needs, strict=True))), *flags)


def _nothing_is_kept(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("experts_lora_inference keeps nothing to differentiate with; call experts_lora")


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "experts_lora has no second derivative; build the experts of grouped_mm, permute and combine, "
        "which can be differentiated any number of times"
    )


torch.library.register_autograd("moesaic::experts_lora", _gradients, setup_context=_save)
torch.library.register_autograd("moesaic::experts_lora_inference", _nothing_is_kept)
torch.library.register_autograd("moesaic::experts_lora_backward", _no_second_derivative)
