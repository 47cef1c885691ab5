"""experts_mlp with weight gradients that the backward pass adds to buffers, in fp32 beside half-precision weights.

The forward pass is that of ``ops.py``. The backward pass is an operator that changes the buffers, and gives autograd no
gradient of the weights.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moesaic.ops.experts_mlp.activation import Activation
from moesaic.ops.experts_mlp.operands import WITH_GRADIENT, Given, by_name
from moesaic.ops.experts_mlp.ops import WEIGHTS, only, wanted_by
from moesaic.ops.grouped_mm.groups import accumulation_dtype

# Buffers for the gradients of w1, w3 and w2; None for w3 where there is none.
MainGrads = tuple[Tensor | None, Tensor | None, Tensor | None]


class _IntoMainGrads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        buffers: MainGrads,
        activation: Activation,
        impl: str | None,
        copies: Tensor | None,
        *operands: Tensor | None,
    ) -> Tensor:
        z, *pre = torch.ops.moesaic.experts_mlp(*operands, activation, impl, copies)
        # Not saved for the backward pass: autograd would take what another backward pass adds for an error.
        ctx.buffers, ctx.flags = buffers, (activation, impl)
        ctx.save_for_backward(*operands, *pre, copies)
        return z

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = wanted_by(ctx.needs_input_grad[4:])
        wanted = dict(zip(WITH_GRADIENT, needs, strict=True))
        into = [buffer if wanted[weight] else None for weight, buffer in zip(WEIGHTS, ctx.buffers, strict=True)]
        needs = [needs and name not in WEIGHTS for name, needs in wanted.items()]
        *saved, copies = ctx.saved_tensors
        found = torch.ops.moesaic.experts_mlp_backward_into(*grads, *saved, *into, *ctx.flags, needs, copies)
        return None, None, None, None, *by_name(only(found, needs))


def experts_mlp_into(
    buffers: MainGrads,
    operands: tuple[Tensor | None, ...],
    activation: Activation,
    impl: str | None,
    copies: Tensor | None,
) -> Tensor:
    """The result of the operator ``experts_mlp``, whose backward pass adds the weights' gradients to buffers."""
    return _IntoMainGrads.apply(buffers, activation, impl, copies, *operands)


def check_main_grads(main_grads: MainGrads, given: Given) -> None:
    """Raise unless the gradients of the weights can be added to the buffers.

    Raises:
        ValueError, TypeError, RuntimeError: see :func:`moesaic.experts_mlp`.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("main_grads: not under torch.compile(fullgraph=True); leave either out")
    if len(main_grads) != 3:
        raise ValueError(f"main_grads: expected one buffer each for w1, w3 and w2, got {len(main_grads)}")
    for name, buffer in zip(WEIGHTS, main_grads, strict=True):
        w = given.get(name)
        if (w is None) != (buffer is None):
            state = ("no buffer", "give one") if buffer is None else (f"a buffer, and there is no {name}", "give None")
            raise ValueError(f"main_grads: {state[0]} for {name}; {state[1]}")
        if w is not None and buffer is not None:
            _check(name, w, buffer)


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
