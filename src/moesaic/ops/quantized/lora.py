"""torch.library definitions of experts_lora with quantised weights: QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import no_autocast
from moesaic.ops.experts_lora.impl import reference, rows
from moesaic.ops.experts_lora.operands import FACTOR_NAMES, FACTORS, WITH_GRADIENT
from moesaic.ops.experts_lora.problem import Adapted, Wanted, adapted, by_factor
from moesaic.ops.experts_mlp.activation import Activation
from moesaic.ops.experts_mlp.operands import check_operands
from moesaic.ops.quantized.experts import FLAGS, SCHEMA, hidden_of, in_parts, put_together
from moesaic.ops.quantized.experts import NAMES as BASE
from moesaic.ops.quantized.formats import Format

NAMES = (*BASE, *FACTOR_NAMES)
_OPERANDS = ", ".join([SCHEMA, *(f"Tensor? {name}" for name in FACTOR_NAMES)])
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in WITH_GRADIENT)
torch.library.define("moesaic::quantized_experts_lora", f"({_OPERANDS}, {FLAGS}) -> (Tensor z, Tensor h1, Tensor h3)")
torch.library.define("moesaic::quantized_experts_lora_inference", f"({_OPERANDS}, {FLAGS}) -> Tensor")
torch.library.define(
    "moesaic::quantized_experts_lora_backward",
    f"(Tensor grad, {_OPERANDS}, Tensor h1, Tensor h3, {FLAGS}, bool[] needs) -> ({_GRADIENTS})",
)


def lora_op(given: Mapping[str, Any], format: Format, hidden: Any, activation: Activation, impl: str | None) -> Tensor:
    """The result, from the operands that are given, weights and factors among them."""
    operands, flags = in_parts(given, NAMES), (format, hidden, activation, impl)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        return torch.ops.moesaic.quantized_experts_lora_inference(*operands, *flags)
    return torch.ops.moesaic.quantized_experts_lora(*operands, *flags)[0]


def _module(impl: str | None) -> Any:
    return reference if impl == "reference" else rows


def _problem(operator: str, tensors: Any, flags: Any, kept: Mapping[str, Tensor]) -> tuple[Adapted, str | None]:
    format, hidden, activation, impl = flags
    given = put_together(dict(zip(NAMES, tensors, strict=True)), format, hidden)
    check_operands(operator, given, activation, kept, factors=FACTORS)
    return adapted(given, activation), impl


@torch.library.impl("moesaic::quantized_experts_lora", "default")
def _forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    problem, impl = _problem("quantized_experts_lora", (x, *args[:-4]), args[-4:], {})
    with no_autocast(x.device.type):
        z_TD, kept = _module(impl).forward(problem, save=True, impl=impl)
    pre = [h_TKF.unflatten(0, x.shape[:2]) for h_TKF in kept]
    return _like_x(z_TD, x), *pre, *(_zeros(pre[0], pre[0].shape) for _ in range(2 - len(pre)))


@torch.library.impl("moesaic::quantized_experts_lora_inference", "default")
def _inference(x: Tensor, *args: Any) -> Tensor:
    problem, impl = _problem("quantized_experts_lora_inference", (x, *args[:-4]), args[-4:], {})
    with no_autocast(x.device.type):
        return _like_x(_module(impl).forward(problem, save=False, impl=impl).z_TD, x)


@torch.library.impl("moesaic::quantized_experts_lora_backward", "default")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, h3 = args[:-5]
    *flags, needs = args[-5:]
    kept = {"grad": grad, "h1": h1, "h3": h3}
    problem, impl = _problem("quantized_experts_lora_backward", tensors, flags, kept)
    pre = tuple(h.flatten(0, 1) for h in (h1, h3)[: len(problem.up)])
    with no_autocast(grad.device.type):
        found = _module(impl).backward(
            grad.flatten(0, 1), problem, pre, Wanted(needs[0], needs[1], any(needs[2:])), impl
        )
    of = {"x": found.x_TD, "weights": found.weights_TK} | by_factor(found)
    wanted = {name: t if needed else None for (name, t), needed in zip(of.items(), needs, strict=True)}
    return _in_order(dict(zip(NAMES, tensors, strict=True)), wanted, h1)


def _in_order(given: Mapping[str, Any], found: Mapping[str, Tensor | None], h1: Tensor) -> tuple[Tensor, ...]:
    """The gradients of all operands that have one, in their shapes; of those that were not found, zeros."""
    sizes = {"W": given["w1"].shape[0], "D": given["x"].shape[-1], "F": h1.shape[-1]}
    of = {factor.name: tuple(sizes.get(dim, 0) for dim in factor.dims.split()) for factor in FACTORS}
    results = []
    for name in WITH_GRADIENT:
        t, like = found[name], given[name]
        shape = of[name] if like is None else like.shape
        results.append(_zeros(given["x"] if like is None else like, shape) if t is None else t.reshape(shape))
    return tuple(results)


def _zeros(like: Tensor, shape: Any) -> Tensor:
    """Zeros without memory, in the place of what is not given or not wanted."""
    return like.new_zeros(1).expand(shape)


def _like_x(z_TD: Tensor, x: Tensor) -> Tensor:
    # Not a view: an in-place operation on a view of what an operator made is an error.
    return torch.ops.aten._unsafe_view(z_TD, x.shape)


@torch.library.register_fake("moesaic::quantized_experts_lora")
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    t = dict(zip(NAMES, args[:-4], strict=True))
    h1 = t["x"].new_empty(*t["ids"].shape, hidden_of(t, args[-4], args[-3]))
    return t["x"].new_empty(t["x"].shape), h1, _zeros(h1, h1.shape) if t["w3"] is None else torch.empty_like(h1)


@torch.library.register_fake("moesaic::quantized_experts_lora_inference")
def _inference_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("moesaic::quantized_experts_lora_backward")
def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    given, h1, needs = dict(zip(NAMES, args, strict=False)), args[len(NAMES)], args[-1]
    found = {
        name: given[name].new_empty(given[name].shape) if needed and given[name] is not None else None
        for name, needed in zip(WITH_GRADIENT, needs, strict=True)
    }
    return _in_order(given, found, h1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.flags = inputs[: len(NAMES)], inputs[len(NAMES) :]
    _, *pre = output
    # Nothing is differentiated through the pre-activations: no zeros of their size in the place of a gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*pre)
    ctx.save_for_backward(*tensors, *pre)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    flags = (None,) * len(ctx.flags)
    if grad is None:
        return (*[None] * len(NAMES), *flags)
    needed = dict(zip(NAMES, ctx.needs_input_grad, strict=False))
    needs = [needed[name] for name in WITH_GRADIENT]
    found = torch.ops.moesaic.quantized_experts_lora_backward(grad, *ctx.saved_tensors, *ctx.flags, needs)
    of = {name: t for name, t, wanted in zip(WITH_GRADIENT, found, needs, strict=True) if wanted}
    return (*(of.get(name) for name in NAMES), *flags)


def _not_differentiable(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "experts_lora has no second derivative, and its inference keeps nothing; build the experts of grouped_mm, "
        "permute and combine, which can be differentiated any number of times"
    )


torch.library.register_autograd("moesaic::quantized_experts_lora", _gradients, setup_context=_save)
torch.library.register_autograd("moesaic::quantized_experts_lora_inference", _not_differentiable)
torch.library.register_autograd("moesaic::quantized_experts_lora_backward", _not_differentiable)
