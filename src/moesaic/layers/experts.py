"""The experts of a layer: MLPs with or without a gate. One tensor holds the same weight of all experts.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, E experts.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.layers.dropout import copy_keys
from moesaic.layers.initial import check_generators
from moesaic.layers.lora import WEIGHTS, active_adapter, dropout_of
from moesaic.layers.packed import unpacked
from moesaic.ops import Activation, Implementation, experts_lora, experts_mlp
from moesaic.ops.arguments import check_int

MainGrads = tuple[Tensor | None, Tensor | None, Tensor | None]


class GroupedExperts(nn.Module):
    """E experts: ``z[t] = sum over k of topk_weights[t, k] * expert_e(x[t])``, where ``e`` is ``topk_ids[t, k]``.

    An expert is an MLP. With a gate it computes ``(act(x w1[e]) * (x w3[e])) w2[e]``, without a gate
    ``act(x w1[e]) w2[e]``. Biases, if there are any, are added to the products: ``x w1[e] + b1[e]``, and so on.
    :func:`moesaic.experts_mlp` computes all of it.

    The weights may be DTensors. Then the tokens have the blocked form. On an (ep, etp) mesh w1 and w3 are
    ``[Shard(0), Shard(2)]`` and w2 is ``[Shard(0), Shard(1)]``. ``x``, ``topk_ids`` and ``topk_weights`` have ``ep``
    blocks and are ``[Shard(0), Replicate()]``. The result is ``[Shard(0), Partial()]``. Neither pass needs a
    collective. E need not be a multiple of ep, and F need not be a multiple of etp.

    If FSDP wraps this module on its own with a ``MixedPrecisionPolicy`` of a half dtype, set
    ``cast_forward_inputs=False`` in that policy. Otherwise FSDP rounds ``topk_weights`` too.

    Args:
        num_experts, dim, hidden_dim: E, D, F.
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` (GEGLU), or another one of :func:`moesaic.experts_mlp`.
        gated: whether the experts have a gate.
        biases: whether the experts have biases.
        impl: implementation of :func:`moesaic.experts_mlp`; None picks one by device and dtype.

    Attributes:
        w1, w3: ``[E, D, F]``, gate and up projections. Without a gate ``w1`` is the up projection and ``w3`` is None.
        w2: ``[E, F, D]``, down projection. :func:`moesaic.layers.quantize_` puts modules in the place of the three,
            which hold them in 8 or 4 bits.
        b1, b3, b2: biases of the three, ``[E, F]``, ``[E, F]`` and ``[E, D]``; None where there are none.
        main_grads: None, or a buffer for each of ``w1``, ``w3`` and ``w2``. The backward pass adds the gradients to
            the buffers, and the weights get no ``.grad``: see :func:`moesaic.experts_mlp`. In a parallel layer
            (``parallelize(..., compute="local")``) the buffers have the shapes of this rank's weights,
            ``w1.to_local()``. If ``edp`` ranks share weights, the buffers have the shapes of the shared weights, and
            each rank's buffers hold its part of the sum.
        adapters, active_adapter: low-rank adapters by name, and the name of the one that is used; both None if there
            are none: see :mod:`moesaic.layers.lora`.
        hidden_columns: gives the numbers of the hidden columns that this rank has; None if it has all.

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
        for name, size in {"num_experts": num_experts, "dim": dim, "hidden_dim": hidden_dim}.items():
            check_int(name, size)
        self.num_experts, self.activation, self.impl = num_experts, activation, impl
        self.main_grads: MainGrads | None = None
        self.adapters: nn.ModuleDict | None = None
        self.active_adapter: str | None = None
        self.hidden_columns: Callable[[torch.device], Tensor] | None = None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.w1 = parameter(dim, hidden_dim)
        self.register_parameter("w3", parameter(dim, hidden_dim) if gated else None)
        self.w2 = parameter(hidden_dim, dim)
        self.register_parameter("b1", parameter(hidden_dim) if biases else None)
        self.register_parameter("b3", parameter(hidden_dim) if biases and gated else None)
        self.register_parameter("b2", parameter(dim) if biases else None)
        self.reset_parameters()

    init_std = 0.02
    """Standard deviation of new weights."""

    def reset_parameters(self) -> None:
        check_generators(self)
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("w"):
                nn.init.normal_(parameter, std=self.init_std)
            else:
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Float[Tensor, "*B T D"],
        topk_ids: Int[Tensor, "*B T K"],
        topk_weights: Float[Tensor, "*B T K"],
        keys: Int[Tensor, "*B T K"] | None = None,
        copies: Int[Tensor, "*B C"] | None = None,
    ) -> Float[Tensor, "*B T D"]:
        """Send each token through its experts, and sum their results with the weights ``topk_weights``.

        With an adapter that has a dropout, ``keys`` decide what it drops; see :func:`moesaic.ops.experts_lora`. None
        draws some. ``copies`` lists the copies that are here, if not all are; see :func:`moesaic.experts_mlp`.
        """
        operands = (x, topk_ids, topk_weights, *(unpacked(w) for w in (self.w1, self.w3, self.w2)))
        options: Any = {"activation": self.activation, "copies": copies, "impl": self.impl}
        options |= {"b1": self.b1, "b3": self.b3, "b2": self.b2}
        adapter = active_adapter(self)
        if adapter is None:
            return experts_mlp(*operands, main_grads=self.main_grads, **options)
        if self.main_grads is not None:
            raise ValueError("main_grads: experts with adapters are frozen; set main_grads to None")
        lora1, lora3, lora2 = (adapter.scaled(weight, x.dtype) for weight in WEIGHTS)
        if dropout := dropout_of(self):
            if keys is None:
                keys = copy_keys(topk_ids.shape[:-1], topk_ids.shape[-1], x.device).view(topk_ids.shape)
            columns = None if self.hidden_columns is None else self.hidden_columns(x.device)
            options |= {"dropout": dropout, "keys": keys, "columns": columns}
        return experts_lora(*operands, lora1=lora1, lora3=lora3, lora2=lora2, **options)

    def extra_repr(self) -> str:
        E, D, hidden = self.w1.shape
        form = "" if self.w3 is not None else ", gated=False"
        return f"num_experts={E}, dim={D}, hidden_dim={hidden}{form}"
