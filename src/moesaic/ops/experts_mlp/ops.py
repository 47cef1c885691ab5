"""torch.library definitions of experts_mlp: operators, fakes and gradients.

``experts_mlp`` gives back, beside the result, the pre-activations that its gradient needs; where no gradient is asked
for, ``experts_mlp_inference`` does not keep them. ``experts_mlp_backward`` gives the gradients of all operands that
have one, in their order; those that ``needs`` does not ask for are zeros without memory. It has no gradient of its own.
``experts_mlp_backward_into`` does the same, and adds those of the weights to buffers where it is given some.

``copies`` lists the copies that are here. Then the pre-activations are theirs alone, ``[B, C, F]`` in the list's order,
and a copy that is not listed is not here, whatever its id.

Tokens come in ``B`` blocks of ``N``, each with experts of its own: expert ``g`` of block ``b`` is matrix ``b * G + g``
of the weights, and the last blocks may have fewer. An implementation sees one block: its ids are numbers of matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import no_autocast
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
from moesaic.ops.experts_mlp.implementations import module_for
from moesaic.ops.experts_mlp.operands import (
    COPIES,
    DOWN,
    NAMES,
    OPERANDS,
    SCHEMA,
    UP,
    WITH_GRADIENT,
    Given,
    check_operands,
    named,
    shapes,
)
from moesaic.ops.experts_mlp.problem import Target, Targets, Wanted, one_block
from moesaic.ops.layout import empty_gradient

_FLAGS = "str activation, str? impl"
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in WITH_GRADIENT)
# The weights' names, and the letters by which a schema says that their buffers are changed.
_BUFFERS = ", ".join(f"Tensor({c}!)? g{weight}" for c, (weight, _) in zip("abc", (*UP, DOWN), strict=True))
_BACKWARD = f"Tensor grad, {SCHEMA}, Tensor h1, Tensor h3"
torch.library.define("moesaic::experts_mlp", f"({SCHEMA}, {_FLAGS}, {COPIES}) -> (Tensor z, Tensor h1, Tensor h3)")
torch.library.define("moesaic::experts_mlp_inference", f"({SCHEMA}, {_FLAGS}, {COPIES}) -> Tensor")
torch.library.define(
    "moesaic::experts_mlp_backward", f"({_BACKWARD}, {_FLAGS}, bool[] needs, {COPIES}) -> ({_GRADIENTS})"
)
# No sharding rule: DTensor might add to a redistributed copy, so it refuses the operator.
torch.library.define(
    "moesaic::experts_mlp_backward_into",
    f"({_BACKWARD}, {_BUFFERS}, {_FLAGS}, bool[] needs, {COPIES}) -> ({_GRADIENTS})",
)
WEIGHTS = tuple(weight for weight, _ in (*UP, DOWN))


@torch.library.impl("moesaic::experts_mlp", "default")
def _forward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, activation, impl, copies = with_copies(args, len(NAMES) + 3)
    given = named(tuple(tensors))
    x = given["x"]
    check_operands("experts_mlp", given, activation, copies=copies)
    problem = one_block(given, activation, copies)
    with no_autocast(x.device.type):
        z_TD, kept = module_for("experts_mlp", impl, problem).forward(problem, save=True)
    return results(z_TD, kept, x, given["ids"], copies)


@torch.library.impl("moesaic::experts_mlp_inference", "default")
def _inference(*args: Any) -> Tensor:
    *tensors, activation, impl, copies = with_copies(args, len(NAMES) + 3)
    given = named(tuple(tensors))
    x = given["x"]
    check_operands("experts_mlp_inference", given, activation, copies=copies)
    problem = one_block(given, activation, copies)
    with no_autocast(x.device.type):
        z_TD = module_for("experts_mlp_inference", impl, problem).forward(problem, save=False).z_TD
    return like_x(z_TD, x)


@torch.library.impl("moesaic::experts_mlp_backward", "default")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, activation, impl, needs, copies = with_copies(args, len(NAMES) + 6)
    return _all_gradients("experts_mlp_backward", grad, tuple(tensors), {}, activation, impl, needs, copies)


@torch.library.impl("moesaic::experts_mlp_backward_into", "default")
def _backward_into(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, gw1, gw3, gw2, activation, impl, needs, copies = with_copies(args, len(NAMES) + 9)
    buffers = dict(zip(WEIGHTS, (gw1, gw3, gw2), strict=True))
    return _all_gradients("experts_mlp_backward_into", grad, tuple(tensors), buffers, activation, impl, needs, copies)


def _all_gradients(
    operator: str,
    grad: Tensor,
    tensors: tuple[Any, ...],
    buffers: Mapping[str, Tensor | None],
    activation: Any,
    impl: str | None,
    needs: list[bool],
    copies: Tensor | None,
) -> tuple[Tensor, ...]:
    *operands, h1, h3 = tensors
    given = named(tuple(operands))
    check_operands(operator, given, activation, {"grad": grad, "h1": h1, "h3": h3}, buffers, copies=copies)
    problem = one_block(given, activation, copies)
    wants = dict(zip(WITH_GRADIENT, needs, strict=True))
    targets = {
        name: Target(given[name], buffers.get(name))
        for name in WITH_GRADIENT[2:]
        if given[name] is not None and (wants[name] or buffers.get(name) is not None)
    }

    def of(weight: str, bias: str) -> Targets:
        return Targets(targets.get(weight), targets.get(bias))

    up = tuple(of(weight, bias) for weight, bias in UP if given[weight] is not None)
    pre = tuple(to_lines(h) for h in (h1, h3)[: len(up)])
    with no_autocast(grad.device.type):
        module = module_for(operator, impl, problem)
        gx, gweights = module.backward(
            grad.flatten(0, 1), problem, pre, Wanted(wants["x"], wants["weights"], up, of(*DOWN))
        )
    found = {"x": gx, "weights": gweights} | {name: t.buffer for name, t in targets.items() if not t.adds}
    return _in_order(given, found)


def _in_order(given: Given, found: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients of all operands that have one, in their shapes; of those that were not found, zeros."""
    of = shapes(given)
    gradients = []
    for name in WITH_GRADIENT:
        t, like = found.get(name), given[name] if given[name] is not None else given["x"]
        gradients.append(zeros(like, of[name]) if t is None else t.view(of[name]))
    return tuple(gradients)


@torch.library.register_fake("moesaic::experts_mlp")
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, copies = with_copies(args, len(NAMES) + 3)
    given = named(tuple(tensors))
    return fake_results(given["x"], given["ids"], given["w3"], given["w1"].shape[2], copies)


torch.library.register_fake("moesaic::experts_mlp_inference", fake_inference)


@torch.library.register_fake("moesaic::experts_mlp_backward")
def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, _, _, needs, _ = with_copies(args, len(NAMES) + 6)
    return _fake_gradients(named(tuple(tensors)), (), needs)


@torch.library.register_fake("moesaic::experts_mlp_backward_into")
def _backward_into_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, gw1, gw3, gw2, _, _, needs, _ = with_copies(args, len(NAMES) + 9)
    return _fake_gradients(named(tuple(tensors)), (gw1, gw3, gw2), needs)


def _fake_gradients(given: Given, buffers: Sequence[Tensor | None], needs: list[bool]) -> tuple[Tensor, ...]:
    found = {
        name: empty_gradient(t, t.dtype) if name in WEIGHTS else t.new_empty(t.shape)
        for name, wanted in zip(WITH_GRADIENT, needs, strict=True)
        if wanted and (t := given[name]) is not None
    }
    added = {weight for weight, buffer in zip(WEIGHTS, buffers, strict=False) if buffer is not None}
    return _in_order(given, {name: t for name, t in found.items() if name not in added})


def wanted_by(needs_input_grad: tuple[bool, ...]) -> list[bool]:
    """Which of the operands that can have a gradient want one."""
    return [needs for operand, needs in zip(OPERANDS, needs_input_grad, strict=False) if operand.differentiable]


def only(found: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted."""
    return tuple(t if wanted else None for t, wanted in zip(found, needs, strict=True))


register_gradients(
    "experts_mlp",
    NAMES,
    WITH_GRADIENT,
    of_inference="experts_mlp_inference keeps nothing to differentiate with; call moesaic.experts_mlp",
    of_backward=f"experts_mlp has no second derivative; {AGAIN}",
)
