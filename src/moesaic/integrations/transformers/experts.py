"""Our kernels in every transformers model with the experts interface: ``experts_implementation="moesaic"``.

The modules keep their parameters, with their names and layouts. Only the computation between the router and the
residual is ours.

Legend: T tokens, K top-k, R rows, E experts, D model dim, F hidden dim, N width of the first projection (2F if gated).
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations import moe

from moesaic.integrations.transformers.activations import activation_name, own_gate_name
from moesaic.ops import Activation, combine, experts_mlp, grouped_mm, permute, sort_by_expert


class _Weights(NamedTuple):
    """The parameters of an experts module, for ``y = x @ w + b``. They are views, not copies."""

    first_EDN: Tensor
    first_bias_EN: Tensor | None
    down_EFD: Tensor
    down_bias_ED: Tensor | None


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, copies: Tensor | None = None
) -> Tensor:
    """Compute with our operators what an experts module of transformers computes.

    ``z[t] = sum over k of weights[t, k] * norm(gate(x[t] @ first[e] + b[e]) @ down[e] + c[e])``, where ``e`` is
    ``index[t, k]``. Copies with ``e >= E`` add nothing.

    Args:
        experts: a module whose class ``transformers.integrations.moe.use_experts_implementation`` has decorated.
        hidden_states: ``[T, D]``.
        top_k_index: ``[T, K]``.
        top_k_weights: ``[T, K]``.
        copies: which copies are here, if most are not: see :func:`moesaic.experts_mlp`. All of them have ids of
            experts, and no other copy has.

    Returns:
        ``[T, D]``, of the dtype of ``hidden_states``.

    Raises:
        TypeError: the module does not follow the interface, or its weights are quantized or DTensors.
    """
    weights = _weights(experts)
    activation = _fused_activation(experts)
    if activation is not None:
        return _fused(experts, weights, activation, hidden_states, top_k_index, top_k_weights, copies)
    num_rows = None if copies is None else len(copies)
    rows = sort_by_expert(top_k_index, weights.first_EDN.shape[0], num_rows=num_rows)
    h_RN = _linear(permute(hidden_states, rows), weights.first_EDN, weights.first_bias_EN, rows.group_sizes)
    h_RF = experts._apply_gate(h_RN) if experts.has_gate else experts.act_fn(h_RN)
    y_RD = _linear(h_RF, weights.down_EFD, weights.down_bias_ED, rows.group_sizes)
    if experts.has_post_expert_norm:
        y_RD = experts.post_expert_norm(y_RD)
    return combine(y_RD, rows, top_k_weights).to(hidden_states.dtype)


def _fused_activation(experts: Any) -> Activation | None:
    """The activation, if the module computes what :func:`experts_mlp` does; else None."""
    if experts.has_post_expert_norm:
        return None
    if experts.has_gate and type(experts)._apply_gate is not moe._default_apply_gate:
        return own_gate_name(experts)
    return activation_name(experts.act_fn)


def _fused(
    experts: Any,
    weights: _Weights,
    activation: Activation,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    copies: Tensor | None,
) -> Tensor:
    w1, w3 = _halves(experts, weights.first_EDN, activation) if experts.has_gate else (weights.first_EDN, None)
    b1, b3 = weights.first_bias_EN, None
    if experts.has_gate and b1 is not None:
        b1, b3 = _parts(b1, 1, activation)
    z_TD = experts_mlp(
        x_TD,
        ids_TK,
        weights_TK,
        w1,
        w3,
        weights.down_EFD,
        activation=activation,
        b1=b1,
        b3=b3,
        b2=weights.down_bias_ED,
        copies=copies,
    )
    return z_TD.to(x_TD.dtype)


def _halves(experts: Any, first_EDN: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Gate and up projection, cut so that one copy puts their gradients together in the parameter's layout."""
    if experts.is_transposed:
        return _parts(first_EDN, 2, activation)
    gate, up = _parts(first_EDN.mT, 1, activation)
    return gate.mT, up.mT


def _parts(both: Tensor, dim: int, activation: Activation) -> tuple[Tensor, Tensor]:
    """Gate and up along a dim. Up follows gate; for the gate of gpt-oss the two alternate."""
    if activation == "clamped_swiglu":
        gate, up = both.unflatten(dim, (-1, 2)).unbind(dim + 1)
    else:
        gate, up = both.chunk(2, dim)
    return gate, up


def _linear(x_RK: Tensor, w_EKN: Tensor, bias_EN: Tensor | None, group_sizes: Tensor) -> Tensor:
    y_RN = grouped_mm(x_RK, w_EKN, group_sizes)
    if bias_EN is None:
        return y_RN
    # The bias is a product too. So rows of no expert get none, and its gradient is a sum in a fixed order.
    return y_RN + grouped_mm(x_RK.new_ones(x_RK.shape[0], 1), bias_EN.unsqueeze(1), group_sizes)


def check_follows_interface(experts: nn.Module, instead: str) -> None:
    """Raise ``TypeError`` unless the module says of itself what transformers' experts interface wants to know."""
    if not all(hasattr(experts, flag) for flag in ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")):
        raise TypeError(
            f"experts: {type(experts).__name__} does not follow transformers' experts interface; decorate its class "
            f"with transformers.integrations.moe.use_experts_implementation, or use {instead}"
        )


def _weights(experts: nn.Module) -> _Weights:
    check_follows_interface(experts, 'experts_implementation="eager"')
    first, down = "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"
    first_w, down_w = _parameter(experts, first), _parameter(experts, down)
    return _Weights(
        first_w if experts.is_transposed else first_w.mT,
        _parameter(experts, f"{first}_bias") if experts.has_bias else None,
        down_w if experts.is_transposed else down_w.mT,
        _parameter(experts, f"{down}_bias") if experts.has_bias else None,
    )


def _parameter(experts: nn.Module, name: str) -> Tensor:
    value = getattr(experts, name, None)
    remedy = 'use another experts_implementation, such as "eager"'
    if not isinstance(value, Tensor):
        raise TypeError(f"experts: {type(experts).__name__} has no parameter '{name}'; {remedy}")
    if isinstance(value, DTensor):
        raise TypeError(
            f"experts: '{name}' of {type(experts).__name__} is a DTensor, but the interface passes local tokens; "
            f"{remedy}, or use swap_moe() and moesaic.parallelize()"
        )
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        raise TypeError(f"experts: '{name}' of {type(experts).__name__} is quantized, {value.dtype}; {remedy}")
    return value
