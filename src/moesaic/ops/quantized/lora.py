"""torch.library definitions of experts_lora with quantised weights: QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import no_autocast
from moesaic.ops.experts_lora.operands import FACTORS, INDICES, OWN_NAMES, OWN_SCHEMA, WITH_GRADIENT
from moesaic.ops.experts_lora.ops import in_order, module_of
from moesaic.ops.experts_lora.problem import Adapted, Wanted, adapted, by_factor
from moesaic.ops.experts_mlp.activation import Activation
from moesaic.ops.experts_mlp.definitions import (
    AGAIN,
    fake_inference,
    fake_results,
    like_x,
    register_gradients,
    results,
    to_lines,
    with_copies,
)
from moesaic.ops.experts_mlp.operands import COPIES, check_operands
from moesaic.ops.quantized.experts import FLAGS, SCHEMA, hidden_of, in_parts, put_together
from moesaic.ops.quantized.experts import NAMES as BASE
from moesaic.ops.quantized.formats import Format

NAMES = (*BASE, *OWN_NAMES)
_OPERANDS, _FLAGS = f"{SCHEMA}, {OWN_SCHEMA}", f"{FLAGS}, float dropout"
_NUM_FLAGS = 6  # with the list of copies
_LENGTH = len(NAMES) + _NUM_FLAGS  # of all arguments of the operator; of its backward there are three more
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in WITH_GRADIENT)
torch.library.define(
    "moesaic::quantized_experts_lora", f"({_OPERANDS}, {_FLAGS}, {COPIES}) -> (Tensor z, Tensor h1, Tensor h3)"
)
torch.library.define("moesaic::quantized_experts_lora_inference", f"({_OPERANDS}, {_FLAGS}, {COPIES}) -> Tensor")
torch.library.define(
    "moesaic::quantized_experts_lora_backward",
    f"(Tensor grad, {_OPERANDS}, Tensor h1, Tensor h3, {_FLAGS}, bool[] needs, {COPIES}) -> ({_GRADIENTS})",
)


def lora_op(
    given: Mapping[str, Any], format: Format, hidden: Any, activation: Activation, impl: str | None, dropout: float
) -> Tensor:
    """The result, from the operands that are given, weights and factors among them."""
    operands, flags = in_parts(given, NAMES), (format, hidden, activation, impl, dropout, given.get("copies"))
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        return torch.ops.moesaic.quantized_experts_lora_inference(*operands, *flags)
    return torch.ops.moesaic.quantized_experts_lora(*operands, *flags)[0]


def _problem(operator: str, tensors: Any, flags: Any, kept: Mapping[str, Tensor]) -> tuple[Adapted, str | None]:
    format, hidden, activation, impl, dropout, copies = flags
    given = put_together(dict(zip(NAMES, tensors, strict=True)), format, hidden)
    check_operands(operator, given, activation, kept, factors=FACTORS, indices=INDICES, copies=copies)
    return adapted(given, activation, dropout, copies), impl


@torch.library.impl("moesaic::quantized_experts_lora", "default")
def _forward(x: Tensor, ids: Tensor, *others: Any) -> tuple[Tensor, ...]:
    args = with_copies((x, ids, *others), _LENGTH)
    problem, impl = _problem("quantized_experts_lora", args[:-_NUM_FLAGS], args[-_NUM_FLAGS:], {})
    with no_autocast(x.device.type):
        z_TD, kept = module_of(impl, problem).forward(problem, save=True, impl=impl)
    return results(z_TD, kept, x, ids, args[-1])


@torch.library.impl("moesaic::quantized_experts_lora_inference", "default")
def _inference(x: Tensor, *others: Any) -> Tensor:
    args = with_copies((x, *others), _LENGTH)
    problem, impl = _problem("quantized_experts_lora_inference", args[:-_NUM_FLAGS], args[-_NUM_FLAGS:], {})
    with no_autocast(x.device.type):
        return like_x(module_of(impl, problem).forward(problem, save=False, impl=impl).z_TD, x)


@torch.library.impl("moesaic::quantized_experts_lora_backward", "default")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, h3, format, hidden, activation, impl, dropout, needs, copies = with_copies(args, _LENGTH + 3)
    kept, flags = {"grad": grad, "h1": h1, "h3": h3}, (format, hidden, activation, impl, dropout, copies)
    problem, impl = _problem("quantized_experts_lora_backward", tensors, flags, kept)
    pre = tuple(to_lines(h) for h in (h1, h3)[: len(problem.up)])
    with no_autocast(grad.device.type):
        found = module_of(impl, problem).backward(
            grad.flatten(0, 1), problem, pre, Wanted(needs[0], needs[1], any(needs[2:])), impl
        )
    of = {"x": found.x_TD, "weights": found.weights_TK} | by_factor(found)
    wanted = {name: t if needed else None for (name, t), needed in zip(of.items(), needs, strict=True)}
    return in_order(dict(zip(NAMES, tensors, strict=True)), wanted, h1)


@torch.library.register_fake("moesaic::quantized_experts_lora")
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *tensors, format, hidden, _, _, _, copies = with_copies(args, _LENGTH)
    t = dict(zip(NAMES, tensors, strict=True))
    return fake_results(t["x"], t["ids"], t["w3"], hidden_of(t, format, hidden), copies)


torch.library.register_fake("moesaic::quantized_experts_lora_inference", fake_inference)


@torch.library.register_fake("moesaic::quantized_experts_lora_backward")
def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, _, _, _, _, _, _, needs, _ = with_copies(args, _LENGTH + 3)
    given = dict(zip(NAMES, tensors, strict=True))
    found = {
        name: given[name].new_empty(given[name].shape) if needed and given[name] is not None else None
        for name, needed in zip(WITH_GRADIENT, needs, strict=True)
    }
    return in_order(given, found, h1)


_REFUSED = f"experts_lora has no second derivative, and its inference keeps nothing; {AGAIN}"
register_gradients("quantized_experts_lora", NAMES, WITH_GRADIENT, of_inference=_REFUSED, of_backward=_REFUSED)
