"""torch.library definitions of experts_mlp with quantised weights, in the manner of ``experts_mlp/ops.py``.

``hidden`` is F; it is read where the data of w1 and w3 is flat and that of w2 does not tell either. Then no rank has a
part of it.
"""

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import no_autocast
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
    zeros,
)
from moesaic.ops.experts_mlp.implementations import IMPLEMENTATIONS
from moesaic.ops.experts_mlp.operands import COPIES, DOWN, UP, check_operands
from moesaic.ops.experts_mlp.problem import Problem, Target, Targets, Wanted, one_block
from moesaic.ops.fastest import Call
from moesaic.ops.quantized.formats import Format, is_flat, sizes_of
from moesaic.ops.quantized.implementations import choose_for_quantized
from moesaic.ops.quantized.ops import weight_of

WEIGHTS = ("w1", "w3", "w2")
# In their order in the schema: data of a weight is under the weight's name.
NAMES = ("x", "ids", "weights", "experts", "w1", "s1", "w3", "s3", "w2", "s2", "b1", "b3", "b2")
WITH_GRADIENT = ("x", "weights", "b1", "b3", "b2")
_OPTIONAL = ("w3", "s3", "b1", "b3", "b2")
SCHEMA = ", ".join(f"Tensor{'?' * (name in _OPTIONAL)} {name}" for name in NAMES)
FLAGS = "str format, SymInt hidden, str activation, str? impl"
_LENGTH = len(NAMES) + 5  # of all arguments of the operator; of its backward there are three more
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in WITH_GRADIENT)
torch.library.define(
    "moesaic::quantized_experts_mlp", f"({SCHEMA}, {FLAGS}, {COPIES}) -> (Tensor z, Tensor h1, Tensor h3)"
)
torch.library.define("moesaic::quantized_experts_mlp_inference", f"({SCHEMA}, {FLAGS}, {COPIES}) -> Tensor")
torch.library.define(
    "moesaic::quantized_experts_mlp_backward",
    f"(Tensor grad, {SCHEMA}, Tensor h1, Tensor h3, {FLAGS}, bool[] needs, {COPIES}) -> ({_GRADIENTS})",
)


def experts_op(
    given: Mapping[str, Any], format: Format, hidden: Any, activation: Activation, impl: str | None
) -> Tensor:
    """The result, from the operands that are given, weights among them."""
    operands, flags = in_parts(given, NAMES), (format, hidden, activation, impl, given.get("copies"))
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        return torch.ops.moesaic.quantized_experts_mlp_inference(*operands, *flags)
    return torch.ops.moesaic.quantized_experts_mlp(*operands, *flags)[0]


def in_parts(given: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Tensor | None, ...]:
    """Operands in the order of a schema, with the data and the scales of each weight."""
    parts = dict(given)
    for name in WEIGHTS:
        w = given.get(name)
        parts[name], parts[f"s{name[1]}"] = (None, None) if w is None else (w.data, w.scales)
    return tuple(map(parts.get, names))


def put_together(tensors: Mapping[str, Any], format: Format, hidden: Any) -> dict[str, Any]:
    """The operands of an operator by name, with weights out of data and scales."""
    D, F = tensors["x"].shape[-1], hidden_of(tensors, format, hidden)
    given = {name: t for name, t in tensors.items() if name[0] != "s"}
    for name, (I, O) in {"w1": (D, F), "w3": (D, F), "w2": (F, D)}.items():  # noqa: E741
        if (data := tensors[name]) is not None:
            given[name] = weight_of(data, tensors[f"s{name[1]}"], format, tensors["x"].dtype, I, O)
    return given


@torch.library.impl("moesaic::quantized_experts_mlp", "default")
def _forward(x: Tensor, ids: Tensor, *others: Any) -> tuple[Tensor, ...]:
    args = with_copies((x, ids, *others), _LENGTH)
    problem, impl = _problem("quantized_experts_mlp", args)
    with no_autocast(x.device.type):
        z_TD, kept = _module_for("quantized_experts_mlp", impl, problem).forward(problem, save=True)
    return results(z_TD, kept, x, ids, args[-1])


@torch.library.impl("moesaic::quantized_experts_mlp_inference", "default")
def _inference(x: Tensor, *others: Any) -> Tensor:
    problem, impl = _problem("quantized_experts_mlp_inference", with_copies((x, *others), _LENGTH))
    with no_autocast(x.device.type):
        module = _module_for("quantized_experts_mlp_inference", impl, problem)
        return like_x(module.forward(problem, save=False).z_TD, x)


@torch.library.impl("moesaic::quantized_experts_mlp_backward", "default")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, h3, format, hidden, activation, impl, needs, copies = with_copies(args, _LENGTH + 3)
    kept = {"grad": grad, "h1": h1, "h3": h3}
    flags = (format, hidden, activation, impl, copies)
    problem, impl = _problem("quantized_experts_mlp_backward", (*tensors, *flags), kept)
    given = dict(zip(NAMES, tensors, strict=True))
    wants = dict(zip(WITH_GRADIENT, needs, strict=True))
    targets = {name: Target(given[name]) for name in ("b1", "b3", "b2") if given[name] is not None and wants[name]}
    up = tuple(Targets(None, targets.get(bias)) for weight, bias in UP if given[weight] is not None)
    wanted = Wanted(wants["x"], wants["weights"], up, Targets(None, targets.get(DOWN[1])))
    pre = tuple(to_lines(h) for h in (h1, h3)[: len(up)])
    with no_autocast(grad.device.type):
        module = _module_for("quantized_experts_mlp_backward", impl, problem)
        gx, gweights = module.backward(grad.flatten(0, 1), problem, pre, wanted)
    found = {"x": gx, "weights": gweights} | {name: target.buffer for name, target in targets.items()}
    return _in_order(given, found, h1)


def _problem(
    operator: str, args: tuple[Any, ...], kept: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[Problem, str | None]:
    """What an implementation is given, and its name.

    Args:
        kept: what a backward operator takes besides.
    """
    *tensors, format, hidden, activation, impl, copies = args
    given = put_together(dict(zip(NAMES, tensors, strict=True)), format, hidden)
    check_operands(operator, given, activation, kept, copies=copies)
    return one_block(given, activation, copies), impl


def _module_for(operator: str, impl: str | None, problem: Problem) -> ModuleType:
    weights = (*(p.weight for p in problem.projections), problem.down.weight)
    call = Call(operator, (problem.x_TD, *weights), problem.num_lines, problem.num_experts)
    return choose_for_quantized(IMPLEMENTATIONS, impl, call)


def hidden_of(t: Mapping[str, Any], format: Format, hidden: Any) -> Any:
    """F of this rank."""
    if not is_flat(format, t["w1"]):
        return sizes_of(format, t["w1"])[1]
    return hidden if is_flat(format, t["w2"]) else sizes_of(format, t["w2"])[0]


def _in_order(given: Mapping[str, Any], found: Mapping[str, Tensor | None], h1: Tensor) -> tuple[Tensor, ...]:
    W, F, D = given["w1"].shape[0], h1.shape[-1], given["x"].shape[-1]
    of = {"x": given["x"].shape, "weights": given["weights"].shape, "b1": (W, F), "b3": (W, F), "b2": (W, D)}
    gradients = []
    for name in WITH_GRADIENT:
        t, like = found.get(name), given[name] if given[name] is not None else given["x"]
        gradients.append(zeros(like, of[name]) if t is None else t.view(of[name]))
    return tuple(gradients)


@torch.library.register_fake("moesaic::quantized_experts_mlp")
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *tensors, format, hidden, _, _, copies = with_copies(args, _LENGTH)
    t = dict(zip(NAMES, tensors, strict=True))
    return fake_results(t["x"], t["ids"], t["w3"], hidden_of(t, format, hidden), copies)


torch.library.register_fake("moesaic::quantized_experts_mlp_inference", fake_inference)


@torch.library.register_fake("moesaic::quantized_experts_mlp_backward")
def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, _, _, _, _, _, needs, _ = with_copies(args, _LENGTH + 3)
    given = dict(zip(NAMES, tensors, strict=True))
    found = {
        name: given[name].new_empty(given[name].shape)
        for name, wanted in zip(WITH_GRADIENT, needs, strict=True)
        if wanted and given[name] is not None
    }
    return _in_order(given, found, h1)


register_gradients(
    "quantized_experts_mlp",
    NAMES,
    WITH_GRADIENT,
    of_inference="quantized_experts_mlp_inference keeps nothing to differentiate with; call moesaic.experts_mlp",
    of_backward=f"experts_mlp has no second derivative; {AGAIN}",
)
