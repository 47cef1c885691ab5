"""A tensor that carries losses along: its backward pass is theirs, too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def carry(carrier: Tensor, loss: Tensor, gradient: Callable[[], Tensor | None]) -> Tensor:
    """``carrier``; where its gradient arrives, ``loss`` gets the gradient that ``gradient()`` gives then.

    Nothing is saved for the backward pass: a recomputed forward has to save what the first one saved.
    """
    return _Carrier.apply(carrier, loss, gradient)


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, gradient: Callable[[], Tensor | None]) -> Tensor:
        ctx.gradient = gradient
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grads[0], ctx.gradient(), None
