"""torchtitan's MoE layer on our router, exchange and experts.

Legend: B batch, L sequence, D model dim, E experts.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchtitan.models.common.moe import MoE

from moesaic.integrations.torchtitan.routing import Choice


class MeshMoE(MoE):
    """The layer. Counters, bias and shared experts are torchtitan's. Padding is in none of the counts."""

    @dataclass(kw_only=True, slots=True)
    class Config(MoE.Config):
        pass

    def forward(self, x_BLD: Tensor) -> Tensor:
        weights_BLK, ids_BLK, counts_E = self.router(x_BLD, self.expert_bias_E)
        if self.training:
            with torch.no_grad():
                self.tokens_per_expert_E.add_(counts_E)
        y_BLD = self.routed_experts(x_BLD, weights_BLK, ids_BLK, counts_E)
        return y_BLD if self.shared_experts is None else y_BLD + self.shared_experts(x_BLD)


@contextlib.contextmanager
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Mark padding in the tokens of forward and backward passes inside.

    Tokens with a mask of False go to no expert. They count in no balance loss, in no load and in no update of the bias.
    Their output is that of the shared experts, or zero.

    Args:
        model: has layers made by the override ``moe``.
        mask: ``[B, L]`` bool, for the tokens that this rank gives the model: its part of the batch, and with context
            parallelism its part of the sequences. Ranks of tensor parallelism give the same. In a pipeline every stage
            needs the mask of each microbatch, which schedules do not hand on: not there.

    Raises:
        TypeError: the mask is not bool.
        ValueError: no layer of the model can be masked; the mask has another shape than the tokens.

    Example:
        >>> with token_mask(model, labels != IGNORE_INDEX):
        ...     loss_fn(model(tokens), labels).backward()
    """
    choices = [module for module in model.modules() if isinstance(module, Choice)]
    if not choices:
        raise ValueError(
            "model: no layer of it can be masked; give torchtitan the flag "
            "--override.imports moesaic.integrations.torchtitan.moe"
        )
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise TypeError(f"mask: expected a bool tensor [B, L], got {mask.dtype} {list(mask.shape)}")
    for choice in choices:
        choice.token_mask = mask
    try:
        yield
    finally:
        for choice in choices:
            choice.token_mask = None
