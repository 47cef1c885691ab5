"""The mixture-of-experts layer. It knows nothing of meshes; a parallel plan replaces its dispatcher.

Legend: T tokens, K copies of each token (top-k), D model dim.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.layers.balance import without_padding
from moesaic.layers.config import MoEConfig
from moesaic.layers.dispatch import Dispatcher, LocalDispatcher
from moesaic.layers.dropout import ALONE, Holders, copy_keys
from moesaic.layers.experts import GroupedExperts
from moesaic.layers.jitter import jittered
from moesaic.layers.lora import dropout_of
from moesaic.layers.router import Routing, TopKRouter
from moesaic.ops import Implementation, gated
from moesaic.ops.arguments import check_floats, check_given


class SharedExpert(nn.Module):
    """An MLP that every token goes through: ``(act(x w1) * (x w3)) w2``, or ``act(x w1) w2`` without a gate.

    With ``shared_gate`` the result is multiplied by ``sigmoid(x g)``, one number for each token.
    """

    def __init__(self, config: MoEConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        sizes = (config.dim, config.shared_hidden_dim)
        self.w1 = nn.Linear(*sizes, bias=False, device=device, dtype=dtype)
        self.w3 = nn.Linear(*sizes, bias=False, device=device, dtype=dtype) if config.gated else None
        self.w2 = nn.Linear(*reversed(sizes), bias=False, device=device, dtype=dtype)
        self.gate = nn.Linear(config.dim, 1, bias=False, device=device, dtype=dtype) if config.shared_gate else None
        self.activation = config.shared_activation or config.activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.w2(gated(self.activation, self.w1(x), None if self.w3 is None else self.w3(x)))
        return y if self.gate is None else self.gate(x).sigmoid() * y


class MoE(nn.Module):
    """A mixture-of-experts layer: ``y_t = sum over k of weight_tk * expert_{id_tk}(x_t)  (+ shared(x_t))``.

    ``weight`` and ``id`` come from the :class:`TopKRouter`. The experts are :class:`GroupedExperts`. No token is
    dropped, and nothing is padded. If ``token_mask_t`` is False, the token is padding and ``y_t = 0``. It goes to no
    expert, counts in no loss and no load, and gets no gradient. In training mode ``input_jitter`` multiplies ``x`` by
    noise before all of that.

    Args:
        config: sizes and choices.
        impl: implementation of :func:`moesaic.experts_mlp`; None picks one by device and dtype.
        device, dtype: of the parameters.

    Attributes:
        router, experts, shared: the parts. ``shared`` is None if ``shared_hidden_dim`` is 0.
        dispatcher: brings tokens to the experts and results back. :func:`moesaic.parallelize` replaces it.
        holders: the ranks that hold the layer's tokens, for the dropout of adapters. It replaces these too.
        recompute_experts: whether the backward pass computes the experts again, so that the forward pass keeps of them
            only the tokens and the routing. ``parallelize(..., recompute="experts")`` sets it.

    Example:
        >>> moe = MoE(MoEConfig(dim=64, hidden_dim=128, num_experts=8, top_k=2))
        >>> moe(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 64])
    """

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    def __init__(
        self,
        config: MoEConfig,
        *,
        impl: Implementation | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, MoEConfig):
            hint = "; MoEConfig(**config) makes one" if isinstance(config, dict) else ""
            raise TypeError(f"config: expected a MoEConfig, got {type(config).__name__}{hint}")
        self.config = config
        self.router = TopKRouter(config, device=device, dtype=dtype)
        self.experts = GroupedExperts(
            config.num_experts,
            config.dim,
            config.hidden_dim,
            activation=config.activation,
            gated=config.gated,
            biases=config.expert_biases,
            impl=impl,
            device=device,
            dtype=dtype,
        )
        self.shared = SharedExpert(config, device=device, dtype=dtype) if config.shared_hidden_dim else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.holders: Holders = ALONE
        self.recompute_experts = False

    def forward(
        self,
        x: Float[Tensor, "*tokens D"],
        token_mask: Bool[Tensor, "*tokens"] | Int[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, "*tokens D"]:
        """Apply the layer to tokens of any leading shape.

        Args:
            x: the tokens. The values of padding do not matter, and may be NaN.
            token_mask: False or 0 for padding; None if there is no padding.

        Raises:
            ValueError: the last dim of ``x`` is not the model dim, or ``token_mask`` does not have one bool or integer
                for each token.
        """
        check_given(x=x)
        check_floats(x=x)
        if x.ndim < 2 or x.shape[-1] != self.config.dim:
            raise ValueError(
                f"x: expected [tokens, {self.config.dim}] or [..., {self.config.dim}], got {list(x.shape)}"
            )
        x_TD = x.flatten(0, -2)
        mask_T = None
        if token_mask is not None:
            mask_T = _checked(token_mask, x).flatten()
            # No value of padding may reach a sum over tokens: zero times NaN is NaN. The shared expert gives 0 for 0.
            x_TD = without_padding(x_TD, mask_T)
        # First, for what is drawn for each token depends on how many there are.
        keys_TK = self._keys(x)
        if self.training:
            x_TD = jittered(x_TD, self.config.input_jitter)
        of_router = None if keys_TK is None or not dropout_of(self.router) else keys_TK[:, 0]
        routing = self.router(x_TD, mask_T, max(math.prod(x.shape[:-2]), 1), of_router)._replace(keys=keys_TK)
        rows_RD = x_TD
        if self.config.weigh_inputs:
            rows_RD, routing = _weighed(x_TD, routing)
        meanwhile = None if self.shared is None else partial(self.shared, x_TD)
        dispatched = self.dispatcher.dispatch(rows_RD, routing, self.config.num_experts, meanwhile)
        routed = dispatched.topk_ids, dispatched.topk_weights, dispatched.keys, dispatched.copies
        if self.recompute_experts and torch.is_grad_enabled():
            z = checkpoint(self.experts, dispatched.x, *routed, use_reentrant=False)
        else:
            z = self.experts(dispatched.x, *routed)
        y_TD = self.dispatcher.combine(z, dispatched)
        if self.config.weigh_inputs:
            y_TD = y_TD.view(len(x_TD), self.config.top_k, self.config.dim).sum(1)
        if dispatched.beside is not None:
            y_TD = y_TD + dispatched.beside()
        # Not a view: FSDP warns about views, since an in-place op on one would drop FSDP's backward hook.
        return torch.ops.aten._unsafe_view(y_TD, x.shape)

    def _keys(self, x: Tensor) -> Tensor | None:
        """What decides which numbers adapters drop, for each copy; None if they drop nothing."""
        if not (dropout_of(self.experts) or dropout_of(self.router)):
            return None
        return copy_keys(x.shape[:-1], self.config.top_k, x.device, self.holders)


def _checked(token_mask: Tensor, x: Tensor) -> Tensor:
    """The mask as bools, on the device of ``x``."""
    if not isinstance(token_mask, Tensor) or token_mask.is_floating_point() or token_mask.is_complex():
        kind = token_mask.dtype if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise ValueError(
            f"token_mask: expected a tensor of bools or integers, got {kind}; use torch.as_tensor(token_mask) != 0"
        )
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask: expected {list(x.shape[:-1])}, one value for each token of x {list(x.shape)}, "
            f"got {list(token_mask.shape)}"
        )
    return token_mask.to(x.device) != 0


def _weighed(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """Make each copy of a token a token of its own, for each has another weight. Llama 4 has one copy of a token."""
    weighed_TKD = (x_TD.unsqueeze(1) * routing.weights.unsqueeze(2)).to(x_TD.dtype)
    one_expert = Routing(routing.ids.reshape(-1, 1), torch.ones_like(routing.weights).reshape(-1, 1))
    if routing.keys is not None:
        one_expert = one_expert._replace(keys=routing.keys.reshape(-1, 1))
    return weighed_TKD.flatten(0, 1), one_expert
