"""The experts: gated MLPs, one weight tensor for all of them.

Legend: R rows, D model dim, F hidden dim, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.layers.config import Activation
from moesaic.ops import grouped_mm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class ExpertCompute(Protocol):
    """What :class:`GroupedExperts` computes: rows and weights to rows, on tensors or DTensors."""

    def __call__(self, x: Tensor, group_sizes: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor: ...


def gated_mlp(
    x: Tensor, group_sizes: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *, activation: Activation, impl: str | None
) -> Tensor:
    """``y = (act(x w1) * (x w3)) w2`` for the rows of each group."""
    gate_RF = grouped_mm(x, w1, group_sizes, impl=impl)
    up_RF = grouped_mm(x, w3, group_sizes, impl=impl)
    return grouped_mm(ACTIVATIONS[activation](gate_RF) * up_RF, w2, group_sizes, impl=impl)


class GroupedExperts(nn.Module):
    """E gated MLPs over rows grouped by expert: ``y = (act(x w1[e]) * (x w3[e])) w2[e]``.

    The weights may be DTensors, with ``x`` and ``group_sizes`` DTensors to match: w1, w3 ``[Shard(0), Shard(2)]`` and
    w2 ``[Shard(0), Shard(1)]`` on an (ep, etp) mesh with ``x`` and ``group_sizes`` ``[Shard(0), Replicate]`` in ``ep``
    blocks give a ``[Shard(0), Partial]`` result without a collective, forward or backward. Neither E nor F has to
    divide: ``group_sizes`` is ``[ep, ceil(E / ep)]``, and groups without an expert are empty.

    Args:
        num_experts, dim, hidden_dim: E, D, F.
        activation: ``"silu"`` (SwiGLU) or ``"gelu"`` (GEGLU).
        impl: implementation of :func:`moesaic.grouped_mm`; None picks by device and dtype.

    Attributes:
        w1, w3: ``[E, D, F]``, gate and up projections.
        w2: ``[E, F, D]``, down projection.
        compute: what ``forward`` calls; a parallel plan may replace it.

    Example:
        >>> experts = GroupedExperts(num_experts=3, dim=8, hidden_dim=16)
        >>> experts(torch.randn(5, 8), torch.tensor([2, 0, 3])).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "silu",
        impl: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, device=device, dtype=dtype))
        self.compute: ExpertCompute = partial(gated_mlp, activation=activation, impl=impl)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.w1, self.w3, self.w2):
            nn.init.normal_(weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "R D"], group_sizes: Int[Tensor, "E"] | Int[Tensor, "B G"]
    ) -> Float[Tensor, "R D"]:
        """Apply each expert to its group of rows; ``group_sizes`` as in :func:`moesaic.grouped_mm`."""
        return self.compute(x, group_sizes, self.w1, self.w3, self.w2)

    def extra_repr(self) -> str:
        E, D, hidden = self.w1.shape
        return f"num_experts={E}, dim={D}, hidden_dim={hidden}"
