"""experts_mlp with weight gradients that the backward pass adds to buffers, in fp32 beside half-precision weights.

The forward pass is that of ``ops.py``. The backward pass is an operator that changes the buffers, and gives autograd no
gradient of the weights.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moesaic.ops.autocast import untouched_by_autocast
from moesaic.ops.experts_mlp.implementations import module_for
from moesaic.ops.experts_mlp.ops import DIFFERENTIABLE, OPERANDS, likes, one_block, zeros
from moesaic.ops.experts_mlp.problem import Gradients, MainGrads, Needs
from moesaic.ops.grouped_mm.groups import accumulation_dtype

# No sharding rule: DTensor might add to a redistributed copy, so it refuses the operator.
torch.library.define(
    "moesaic::experts_mlp_backward_into",
    f"(Tensor grad, {OPERANDS}, Tensor? b1, Tensor? b3, Tensor h1, Tensor h3, Tensor(a!)? gw1, Tensor(b!)? gw3, "
    "Tensor(c!)? gw2, int activation, int needs, str? impl) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("moesaic::experts_mlp_backward_into", "default")
@untouched_by_autocast
def _backward(grad: Tensor, x: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, h1, h3, gw1, gw3, gw2, activation, needs, impl = args
    problem = one_block(x, ids, *tensors, activation)
    h3_TKF = None if problem.w3_EDF is None else h3.flatten(0, 1)
    into = MainGrads(gw1, gw3, gw2)
    module = module_for("experts_mlp_backward_into", impl, problem)
    found: Gradients = module.backward(grad.flatten(0, 1), problem, h1.flatten(0, 1), h3_TKF, Needs.unpack(needs), into)
    given = zip(found, likes(x, *tensors), strict=True)
    gx, gweights, _, _, _, gb1, gb3 = (zeros(*like) if g is None else g.view(like[1]) for g, like in given)
    return gx, gweights, gb1, gb3


@torch.library.register_fake("moesaic::experts_mlp_backward_into")
def _backward_fake(grad: Tensor, x: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, _, _, _, _, needs, _ = args
    wanted = Needs.unpack(needs)
    x_like, weights_like, _, _, _, b1_like, b3_like = likes(x, *tensors)
    results = ((x_like, wanted.x), (weights_like, wanted.weights), (b1_like, wanted.b1), (b3_like, wanted.b3))
    return tuple(like[0].new_empty(like[1]) if needed else zeros(*like) for like, needed in results)


class _IntoMainGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, main_grads: MainGrads, activation: int, impl: str | None, *operands: Tensor | None) -> Tensor:
        z, h1, h3 = torch.ops.moesaic.experts_mlp(*operands, activation, impl)
        # Not saved for the backward pass: autograd would take what another backward pass adds for an error.
        ctx.main_grads, ctx.activation, ctx.impl = main_grads, activation, impl
        ctx.save_for_backward(*operands, h1, h3)
        return z

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = Needs(*(ctx.needs_input_grad[3 + i] for i in DIFFERENTIABLE))
        buffers = zip(ctx.main_grads, (needs.w1, needs.w3, needs.w2), strict=True)
        into = [buffer if wanted else None for buffer, wanted in buffers]
        needs = needs._replace(w1=False, w3=False, w2=False)
        gx, gweights, gb1, gb3 = torch.ops.moesaic.experts_mlp_backward_into(
            *grads, *ctx.saved_tensors, *into, ctx.activation, needs.pack(), ctx.impl
        )
        result: list[Tensor | None] = [None] * 12
        for i, wanted, gradient in zip(DIFFERENTIABLE, needs, (gx, gweights, None, None, None, gb1, gb3), strict=True):
            result[3 + i] = gradient if wanted else None
        return tuple(result)


def experts_mlp_into(
    main_grads: MainGrads, operands: tuple[Tensor | None, ...], activation: int, impl: str | None
) -> Tensor:
    """The result of the operator ``experts_mlp``, of whose weights the gradients go into buffers."""
    return _IntoMainGrads.apply(main_grads, activation, impl, *operands)


def check_main_grads(main_grads: tuple[Tensor | None, ...], weights: dict[str, Tensor | None]) -> MainGrads:
    """The buffers, if they are ones that gradients of the weights ``w1``, ``w3``, ``w2`` can be added to.

    Raises:
        ValueError, TypeError, RuntimeError: see :func:`moesaic.experts_mlp`.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("main_grads: not under torch.compile(fullgraph=True); leave either out")
    if len(main_grads) != 3:
        raise ValueError(f"main_grads: expected one buffer each for w1, w3 and w2, got {len(main_grads)}")
    for (name, w), buffer in zip(weights.items(), main_grads, strict=True):
        if (w is None) != (buffer is None):
            state = ("no buffer", "give one") if buffer is None else (f"a buffer, and there is no {name}", "give None")
            raise ValueError(f"main_grads: {state[0]} for {name}; {state[1]}")
        if w is not None and buffer is not None:
            _check(name, w, buffer)
    return MainGrads(*main_grads)


def _check(name: str, w: Tensor, buffer: Tensor) -> None:
    def refuse(what: str, kind: type[Exception] = ValueError) -> NoReturn:
        raise kind(f"main_grads: the buffer for {name} {what}")

    if is_traceable_wrapper_subclass(w) or is_traceable_wrapper_subclass(buffer):
        subclass = type(buffer if is_traceable_wrapper_subclass(buffer) else w).__name__
        raise TypeError(
            f"main_grads: for plain tensors, and {name} or its buffer is a {subclass}; give local tensors, "
            'as parallelize(..., compute="local") does with the weights'
        )
    dtype = accumulation_dtype(w.dtype)
    if buffer.dtype != dtype:
        refuse(f"is {buffer.dtype}; for weights of {w.dtype} give {dtype}", TypeError)
    if buffer.shape != w.shape:
        refuse(f"is {list(buffer.shape)}; give {list(w.shape)}, the shape of {name}")
    if not (buffer.is_contiguous() or buffer.mT.is_contiguous()):
        refuse(f"has strides {buffer.stride()}; give a contiguous tensor, or the .mT of one")
    if buffer.device != w.device:
        refuse(f"is on {buffer.device}, {name} on {w.device}; move it there")
    if buffer.requires_grad:
        refuse("requires a gradient, and this has none; give buffer.detach()")
