"""Balance losses whose gradients come with those of the layer's output, for loops that do not see the losses.

After Megatron-Core's ``MoEAuxLossAutoScaler``.
"""

import math

from torch import Tensor, nn

from moesaic.layers.load import routers


def attach_balance_losses(model: nn.Module, scale: float | Tensor | None) -> None:
    """Let the balance losses of every layer ride on its output, so that its backward pass is theirs, too.

    From now on each forward pass in training mode attaches its balance losses ``b_1, b_2, ...`` to the layer's output
    ``y``. The values of ``y`` stay. A backward pass of a loss ``L`` that goes through ``y`` gives every parameter, and
    every input, the gradient of ::

        L + scale * (b_1 + b_2 + ...)

    For training loops that compute a loss at the end of a pipeline and call backward themselves, such as the schedules
    of ``torch.distributed.pipelining``: the balance losses of the other stages would reach no backward pass. With
    ``M`` forward passes a step (microbatches, gradient accumulation) and a main loss that is multiplied by ``S`` (a
    loss scale against underflow) take ``scale = S / M``; or ``scale = S`` where all gradients are divided by ``M``
    afterwards, as schedules with ``scale_grads=True`` do. Like :func:`moesaic.layers.balance_losses`, each ``b`` is
    this process's part, and gradients sum over processes.

    Inside :func:`moesaic.layers.balance_losses` the values of attached losses are collected without their gradients:
    adding them to a loss does not count them twice. Compiled code attaches losses, and collects none.

    Args:
        model: its routers' ``loss_scale`` is set. Models without routers stay as they are.
        scale: a number of at least 0, or a tensor of one element, which each backward pass reads anew without
            synchronisation. None takes the losses off again. Call again to change it.

    Raises:
        ValueError: ``scale`` is negative, not finite, or a tensor of more elements.

    Example:
        >>> moesaic.layers.attach_balance_losses(stage, 1 / num_microbatches)
        >>> schedule.step(x)
    """
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale: expected a number or a tensor of one element, got shape {list(scale.shape)}")
    elif scale is not None and not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale: expected a finite number of at least 0, got {scale}")
    for router in routers(model).values():
        router.loss_scale = scale
