"""torch.library definitions of experts_mlp: operators, fakes and gradients.

``experts_mlp`` gives back, beside the result, the pre-activations that its gradient needs; where no gradient is asked
for, ``experts_mlp_inference`` does not keep them. ``experts_mlp_backward`` gives all gradients at once; those that
``needs`` does not name are zeros without memory. It has no gradient of its own.

Tokens come in ``B`` blocks of ``N``, each with experts of its own: expert ``g`` of block ``b`` is matrix ``b * G + g``
of the weights, and the last blocks may have fewer. An implementation sees one block: its ids are numbers of matrices.
Of ``experts [B, G]`` only the shape is read. It tells ``G``, which a rank's shard of the weights alone would not.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.ops.autocast import untouched_by_autocast
from moesaic.ops.experts_mlp.activation import ACTIVATIONS
from moesaic.ops.experts_mlp.implementations import module_for
from moesaic.ops.experts_mlp.problem import Gradients, Needs, Problem, number_by_matrix
from moesaic.ops.layout import empty_gradient, lying_as

OPERANDS = "Tensor x, Tensor ids, Tensor weights, Tensor experts, Tensor w1, Tensor? w3, Tensor w2"
torch.library.define(
    "moesaic::experts_mlp",
    f"({OPERANDS}, Tensor? b1, Tensor? b3, int activation, str? impl) -> (Tensor z, Tensor h1, Tensor h3)",
)
torch.library.define(
    "moesaic::experts_mlp_inference",
    f"({OPERANDS}, Tensor? b1, Tensor? b3, int activation, str? impl) -> Tensor",
)
torch.library.define(
    "moesaic::experts_mlp_backward",
    f"(Tensor grad, {OPERANDS}, Tensor? b1, Tensor? b3, Tensor h1, Tensor h3, int activation, int needs, str? impl) "
    "-> (Tensor grad_x, Tensor grad_weights, Tensor grad_w1, Tensor grad_w3, Tensor grad_w2, Tensor grad_b1, "
    "Tensor grad_b3)",
)


def zeros(like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Zeros without memory, in the place of what is not given or not wanted."""
    return like.new_zeros(1).expand(shape)


def one_block(x_BND: Tensor, ids_BNK: Tensor, weights_BNK: Tensor, experts_BG: Tensor, *others: Any) -> Problem:
    """The one-block form: ids count the matrices of all blocks, those of copies that are not here are -1."""
    ids_BNK = number_by_matrix(ids_BNK, experts_BG.shape[1])
    x_TD, ids_TK, weights_TK = (t.flatten(0, 1) for t in (x_BND, ids_BNK, weights_BNK))
    w1, w3, w2, b1, b3, activation = others
    return Problem(x_TD, ids_TK, weights_TK, w1, w3, w2, b1, b3, ACTIVATIONS[activation])


@torch.library.impl("moesaic::experts_mlp", "default")
@untouched_by_autocast
def _forward(x: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, activation, impl = args
    problem = one_block(x, ids, *tensors, activation)
    z_TD, h1_TKF, h3_TKF = module_for("experts_mlp", impl, problem).forward(problem, True)
    h1 = h1_TKF.unflatten(0, x.shape[:2])
    h3 = zeros(h1, h1.shape) if h3_TKF is None else h3_TKF.unflatten(0, x.shape[:2])
    return torch.ops.aten._unsafe_view(z_TD, x.shape), h1, h3


@torch.library.impl("moesaic::experts_mlp_inference", "default")
@untouched_by_autocast
def _inference(x: Tensor, ids: Tensor, *args: Any) -> Tensor:
    *tensors, activation, impl = args
    problem = one_block(x, ids, *tensors, activation)
    z_TD = module_for("experts_mlp_inference", impl, problem).forward(problem, False).z_TD
    return torch.ops.aten._unsafe_view(z_TD, x.shape)


@torch.library.impl("moesaic::experts_mlp_backward", "default")
@untouched_by_autocast
def _backward(grad: Tensor, x: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, h3, activation, needs, impl = args
    problem = one_block(x, ids, *tensors, activation)
    h3_TKF = None if problem.w3_EDF is None else h3.flatten(0, 1)
    module = module_for("experts_mlp_backward", impl, problem)
    found: Gradients = module.backward(grad.flatten(0, 1), problem, h1.flatten(0, 1), h3_TKF, Needs.unpack(needs))
    found = found._replace(
        w1=None if found.w1 is None else lying_as(problem.w1_EDF, found.w1),
        w3=None if found.w3 is None or problem.w3_EDF is None else lying_as(problem.w3_EDF, found.w3),
        w2=None if found.w2 is None else lying_as(problem.w2_EFD, found.w2),
    )
    given = zip(found, likes(x, *tensors), strict=True)
    return tuple(zeros(*like) if g is None else g.view(like[1]) for g, like in given)


def likes(x: Tensor, weights: Tensor, experts: Tensor, *args: Any) -> list[tuple[Tensor, tuple[Any, ...]]]:
    """For every gradient a tensor of its dtype and its shape; of an argument that is not given too."""
    w1, _, w2, b1, b3 = args
    W, _, F = w1.shape
    biases = [(w1 if b is None else b, (W, F)) for b in (b1, b3)]
    return [(t, tuple(t.shape)) for t in (x, weights, w1, w1, w2)] + biases


@torch.library.register_fake("moesaic::experts_mlp")
def _forward_fake(x: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, w1, w3, *_ = args
    h1 = x.new_empty(*ids.shape, w1.shape[2])
    return x.new_empty(x.shape), h1, zeros(h1, h1.shape) if w3 is None else torch.empty_like(h1)


@torch.library.register_fake("moesaic::experts_mlp_inference")
def _inference_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("moesaic::experts_mlp_backward")
def _backward_fake(grad: Tensor, x: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, _, needs, _ = args
    weights, _, w1, w3, w2, b1, b3 = tensors
    projections = [None if w is None else empty_gradient(w, w.dtype) for w in (w1, w3, w2)]
    biases = [None if b is None else b.new_empty(b.shape) for b in (b1, None if w3 is None else b3)]
    gradients = (x.new_empty(x.shape), weights.new_empty(weights.shape), *projections, *biases)
    return tuple(
        gradient if wanted and gradient is not None else zeros(*like)
        for gradient, wanted, like in zip(gradients, Needs.unpack(needs), likes(x, *tensors), strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.impl = inputs
    _, h1, h3 = output
    # Nothing is differentiated through the pre-activations: no zeros of their size in the place of a gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h1, h3)
    ctx.save_for_backward(*tensors, h1, h3)


# Where they stand among the operators' arguments: x, weights, w1, w3, w2, b1, b3.
DIFFERENTIABLE = (0, 2, 4, 5, 6, 7, 8)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * 11
    if grad is None:
        return tuple(result)
    needs = Needs(*(ctx.needs_input_grad[i] for i in DIFFERENTIABLE))
    found = torch.ops.moesaic.experts_mlp_backward(grad, *ctx.saved_tensors, ctx.activation, needs.pack(), ctx.impl)
    for i, wanted, gradient in zip(DIFFERENTIABLE, needs, found, strict=True):
        result[i] = gradient if wanted else None
    return tuple(result)


def _nothing_is_kept(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("experts_mlp_inference keeps nothing to differentiate with; call moesaic.experts_mlp")


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "experts_mlp has no second derivative; build the experts of grouped_mm, permute and combine, "
        "which can be differentiated any number of times"
    )


torch.library.register_autograd("moesaic::experts_mlp", _gradients, setup_context=_save)
torch.library.register_autograd("moesaic::experts_mlp_inference", _nothing_is_kept)
torch.library.register_autograd("moesaic::experts_mlp_backward", _no_second_derivative)
