"""Gradient accumulation: several backward passes, whose gradients are summed over the ranks once."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from moesaic.parallel.gradients import summed_later


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Leave gradients unsummed over the ranks, in every backward pass inside. The next one outside sums all of them.

    With ``M`` micro-batches in a step, run forward and backward of the first ``M - 1`` inside, and those of the last
    one outside. Then ``.grad`` of every parameter is the sum over all micro-batches and all ranks, and each rank has
    sent its gradients once. Divide each loss by the number of tokens of all micro-batches of all ranks.

    Between the passes each rank holds the gradients of *whole* dense weights, and of the experts that it shares with
    the other ranks of ``edp``: that is the price of not sending them. Without ``no_sync`` each backward pass sends, and
    only shards are held. The gradients are the same but for rounding.

    It does what ``no_sync()`` of ``DistributedDataParallel`` does. On a model of one process it does nothing. One
    inside another changes nothing.

    Args:
        model: from :func:`moesaic.parallelize`.

    Example:
        >>> for i, (x, target) in enumerate(micro_batches):
        ...     last = i == len(micro_batches) - 1
        ...     with nullcontext() if last else moesaic.parallel.no_sync(model):
        ...         (loss_sum(model(x), target) / tokens_of_all).backward()
        >>> optimizer.step()
    """
    with summed_later(model.modules()) as modules, summed_later(model.parameters()):
        fsdp = [module for module in modules if isinstance(module, FSDPModule)]
        for module in fsdp:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in fsdp:
                module.set_requires_gradient_sync(True, recurse=False)
