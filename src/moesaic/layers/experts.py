"""The experts: MLPs, gated or not, one weight tensor for all of them.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, E experts.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.ops import Activation, Implementation, experts_mlp

MainGrads = tuple[Tensor | None, Tensor | None, Tensor | None]


class GroupedExperts(nn.Module):
    """E gated MLPs: ``z[t] = sum over k of topk_weights[t, k] * (act(x[t] w1[e]) * (x[t] w3[e])) w2[e]``.

    Without gate it is ``act(x[t] w1[e]) w2[e]``. ``e`` is ``topk_ids[t, k]``, and with biases it is ``x[t] w1[e] +
    b1[e]``, and so for the others; see :func:`moesaic.experts_mlp`, which computes it. The weights may be DTensors,
    with tokens in the blocked form to match: w1, w3 ``[Shard(0), Shard(2)]`` and w2 ``[Shard(0), Shard(1)]`` on an
    (ep, etp) mesh with ``x``, ``topk_ids`` and ``topk_weights`` ``[Shard(0), Replicate]`` in ``ep`` blocks give a
    ``[Shard(0), Partial]`` result without a collective, forward or backward. Neither E nor F has to divide.

    Wrapped on its own by FSDP with a ``MixedPrecisionPolicy`` of a half type, give that ``cast_forward_inputs=False``:
    it would round ``topk_weights``, too.

    Args:
        num_experts, dim, hidden_dim: E, D, F.
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` (GEGLU), or another of :func:`moesaic.experts_mlp`.
        gated: whether there is ``w3``.
        biases: whether there are any.
        impl: implementation of :func:`moesaic.experts_mlp`; None picks by device and dtype.

    Attributes:
        w1, w3: ``[E, D, F]``, gate and up projections; ``w3`` is None without gate.
        w2: ``[E, F, D]``, down projection.
        b1, b3, b2: their biases, ``[E, F]``, ``[E, F]`` and ``[E, D]``; None without.
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

    w3: nn.Parameter | None
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
        gated: bool = True,
        biases: bool = False,
        impl: Implementation | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.activation, self.impl = num_experts, activation, impl
        self.main_grads: MainGrads | None = None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.w1 = parameter(dim, hidden_dim)
        self.register_parameter("w3", parameter(dim, hidden_dim) if gated else None)
        self.w2 = parameter(hidden_dim, dim)
        self.register_parameter("b1", parameter(hidden_dim) if biases else None)
        self.register_parameter("b3", parameter(hidden_dim) if biases and gated else None)
        self.register_parameter("b2", parameter(dim) if biases else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("w"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Float[Tensor, "*B T D"],
        topk_ids: Int[Tensor, "*B T K"],
        topk_weights: Float[Tensor, "*B T K"],
    ) -> Float[Tensor, "*B T D"]:
        """Apply to each token its experts, and sum what they give by the weights."""
        return experts_mlp(
            x,
            topk_ids,
            topk_weights,
            self.w1,
            self.w3,
            self.w2,
            activation=self.activation,
            b1=self.b1,
            b3=self.b3,
            b2=self.b2,
            main_grads=self.main_grads,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        E, D, hidden = self.w1.shape
        form = "" if self.w3 is not None else ", gated=False"
        return f"num_experts={E}, dim={D}, hidden_dim={hidden}{form}"
