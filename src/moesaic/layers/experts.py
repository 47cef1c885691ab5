"""The experts: gated MLPs, one weight tensor for all of them.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.ops import Activation, Implementation, experts_mlp

MainGrads = tuple[Tensor, Tensor, Tensor]


class ExpertCompute(Protocol):
    """What :class:`GroupedExperts` computes: tokens, weights and biases to tokens, on tensors or DTensors."""

    def __call__(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b3: Tensor | None,
        b2: Tensor | None,
        *,
        main_grads: MainGrads | None = None,
    ) -> Tensor: ...


class GroupedExperts(nn.Module):
    """E gated MLPs: ``z[t] = sum over k of topk_weights[t, k] * (act(x[t] w1[e]) * (x[t] w3[e])) w2[e]``.

    ``e`` is ``topk_ids[t, k]``, and with biases it is ``x[t] w1[e] + b1[e]``, and so for the other two; see
    :func:`moesaic.experts_mlp`, which computes it. The weights may be DTensors, with tokens in the blocked form
    to match: w1, w3 ``[Shard(0), Shard(2)]`` and w2 ``[Shard(0), Shard(1)]`` on an (ep, etp) mesh with ``x``,
    ``topk_ids`` and ``topk_weights`` ``[Shard(0), Replicate]`` in ``ep`` blocks give a
    ``[Shard(0), Partial]`` result without a collective, forward or backward. Neither E nor F has to divide.

    Wrapped on its own by FSDP with a ``MixedPrecisionPolicy`` of a half type, give that ``cast_forward_inputs=False``:
    it would round ``topk_weights``, too.

    Args:
        num_experts, dim, hidden_dim: E, D, F.
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` (GEGLU), or another of :func:`moesaic.experts_mlp`.
        biases: whether there are any.
        impl: implementation of :func:`moesaic.experts_mlp`; None picks by device and dtype.

    Attributes:
        w1, w3: ``[E, D, F]``, gate and up projections.
        w2: ``[E, F, D]``, down projection.
        b1, b3, b2: their biases, ``[E, F]``, ``[E, F]`` and ``[E, D]``; None without.
        compute: what ``forward`` calls; a parallel plan may replace it.
        main_grads: None, or buffers that the backward pass adds the gradients of ``w1``, ``w3`` and ``w2`` to, which
            then get no ``.grad``: see :func:`moesaic.experts_mlp`. Of a layer in parallel
            (``parallelize(..., compute="local")``) they have the shapes of this rank's weights, ``w1.to_local()``; over
            ``edp`` ranks, of the weights that these share, and each rank's buffers are its part of the sum.

    Example:
        >>> experts = GroupedExperts(num_experts=3, dim=8, hidden_dim=16)
        >>> experts(torch.randn(5, 8), torch.tensor([[0], [2], [2], [1], [0]]), torch.ones(5, 1)).shape
        torch.Size([5, 8])
    """

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    b1: nn.Parameter | None
    b3: nn.Parameter | None
    b2: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "silu",
        biases: bool = False,
        impl: Implementation | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, device=device, dtype=dtype))
        self.main_grads: MainGrads | None = None
        for name, dim_out in {"b1": hidden_dim, "b3": hidden_dim, "b2": dim}.items():
            bias = torch.empty(num_experts, dim_out, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(bias) if biases else None)
        self.compute: ExpertCompute = partial(_experts_mlp, activation, impl)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.w1, self.w3, self.w2):
            nn.init.normal_(weight, std=0.02)
        for bias in (self.b1, self.b3, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: Float[Tensor, "*B T D"],
        topk_ids: Int[Tensor, "*B T K"],
        topk_weights: Float[Tensor, "*B T K"],
    ) -> Float[Tensor, "*B T D"]:
        """Apply to each token its experts, and sum what they give by the weights."""
        weights, biases = (self.w1, self.w3, self.w2), (self.b1, self.b3, self.b2)
        return self.compute(x, topk_ids, topk_weights, *weights, *biases, main_grads=self.main_grads)

    def extra_repr(self) -> str:
        E, D, hidden = self.w1.shape
        return f"num_experts={E}, dim={D}, hidden_dim={hidden}"


def _experts_mlp(
    activation: Activation,
    impl: Implementation | None,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b3: Tensor | None,
    b2: Tensor | None,
    *,
    main_grads: MainGrads | None = None,
) -> Tensor:
    return experts_mlp(
        x,
        topk_ids,
        topk_weights,
        w1,
        w3,
        w2,
        activation=activation,
        b1=b1,
        b3=b3,
        b2=b2,
        main_grads=main_grads,
        impl=impl,
    )
