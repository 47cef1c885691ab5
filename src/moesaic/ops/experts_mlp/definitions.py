"""What the definitions of experts_mlp, of experts_lora and of both with quantised weights have in common.

Each is three operators. ``NAME`` gives back the result and the pre-activations that its gradient needs,
``NAME_inference`` the result alone, and ``NAME_backward`` the gradients of the operands that have one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

AGAIN = "build the experts of grouped_mm, permute and combine, which can be differentiated any number of times"


def with_copies(args: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """All ``length`` arguments of an operator: torch leaves out ``copies``, the last, where it has its default."""
    return args if len(args) == length else (*args, None)


def zeros(like: Any, shape: Any) -> Tensor:
    """Zeros without memory, in the place of what is not given or not wanted."""
    return like.new_zeros(1).expand(shape)


def like_x(z_TD: Tensor, x: Tensor) -> Tensor:
    """The result in the shape of ``x``. Not a view: an in-place operation on a view of what an operator made fails."""
    return torch.ops.aten._unsafe_view(z_TD, x.shape)


def results(z_TD: Tensor, kept: Sequence[Tensor], x: Tensor, ids: Tensor, copies: Tensor | None) -> tuple[Tensor, ...]:
    """The result and two pre-activations ``[B, N, K, F]``, of listed copies ``[B, C, F]``.

    Without gate the second is zeros.
    """
    pre = [h_LF.unflatten(0, (ids if copies is None else copies).shape) for h_LF in kept]
    return like_x(z_TD, x), *pre, *(zeros(pre[0], pre[0].shape) for _ in range(2 - len(pre)))


def to_lines(h: Tensor) -> Tensor:
    """Pre-activations of all blocks as implementations have them, ``[L, F]``."""
    return h.flatten(0, -2)


def fake_results(x: Tensor, ids: Tensor, w3: Tensor | None, F: Any, copies: Tensor | None) -> tuple[Tensor, ...]:
    """Tensors like :func:`results`."""
    h1 = x.new_empty(*(ids if copies is None else copies).shape, F)
    return x.new_empty(x.shape), h1, zeros(h1, h1.shape) if w3 is None else torch.empty_like(h1)


def fake_inference(x: Tensor, *args: Any) -> Tensor:
    """A tensor like the result."""
    return x.new_empty(x.shape)


def register_gradients(
    operator: str, names: Sequence[str], with_gradient: Sequence[str], *, of_inference: str, of_backward: str
) -> None:
    """Register the gradient of the operator, and that the other two have none.

    Args:
        names: its operands, after which it has flags, and then ``copies``.
        with_gradient: the operands that have a gradient, in the order of the results of its backward operator.
        of_inference, of_backward: what is said where the gradient of one of these is asked for.
    """
    backward = getattr(torch.ops.moesaic, f"{operator}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.flags, copies = inputs[: len(names)], inputs[len(names) : -1], inputs[-1]
        _, *pre = output
        # Nothing is differentiated through the pre-activations: no zeros of their size in the place of a gradient.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*pre)
        ctx.save_for_backward(*tensors, *pre, copies)

    def gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        flags = (None,) * (len(ctx.flags) + 1)
        if grad is None:
            return (*[None] * len(names), *flags)
        needed = dict(zip(names, ctx.needs_input_grad, strict=False))
        needs = [needed[name] for name in with_gradient]
        *saved, copies = ctx.saved_tensors
        found = backward(grad, *saved, *ctx.flags, needs, copies)
        of = {name: t for name, t, wanted in zip(with_gradient, found, needs, strict=True) if wanted}
        return (*(of.get(name) for name in names), *flags)

    def refusing(text: str) -> Any:
        def refuse(ctx: Any, *grads: Tensor) -> None:
            raise NotImplementedError(text)

        return refuse

    torch.library.register_autograd(f"moesaic::{operator}", gradients, setup_context=save)
    torch.library.register_autograd(f"moesaic::{operator}_inference", refusing(of_inference))
    torch.library.register_autograd(f"moesaic::{operator}_backward", refusing(of_backward))
