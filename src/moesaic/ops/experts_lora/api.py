"""The public function ``experts_lora``: its contract and its checks."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.ops.arguments import check_given, check_tensors
from moesaic.ops.autocast import autocast
from moesaic.ops.experts_lora import ops  # noqa: F401 -- registers the operators
from moesaic.ops.experts_lora.dropout import check_dropout
from moesaic.ops.experts_lora.operands import FACTORS, NAMES
from moesaic.ops.experts_mlp.activation import Activation, check_activation
from moesaic.ops.experts_mlp.api import check_copies, check_dtypes, check_shapes
from moesaic.ops.forward_ad import refuse_forward_ad
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS, Implementation
from moesaic.ops.implementations import check_name
from moesaic.ops.quantized.check import quantized_among
from moesaic.ops.quantized.lora import lora_op
from moesaic.ops.quantized.weight import QuantizedWeight

Factors = Sequence[Tensor] | None


def experts_lora(
    x: Float[Tensor, "*B T D"],
    topk_ids: Int[Tensor, "*B T K"],
    topk_weights: Float[Tensor, "*B T K"],
    w1: Float[Tensor, "W D F"] | QuantizedWeight,
    w3: Float[Tensor, "W D F"] | QuantizedWeight | None,
    w2: Float[Tensor, "W F D"] | QuantizedWeight,
    *,
    lora1: Factors = None,
    lora3: Factors = None,
    lora2: Factors = None,
    activation: Activation = "silu",
    b1: Float[Tensor, "W F"] | None = None,
    b3: Float[Tensor, "W F"] | None = None,
    b2: Float[Tensor, "W D"] | None = None,
    dropout: float = 0.0,
    keys: Int[Tensor, "*B T K"] | None = None,
    columns: Int[Tensor, " F"] | None = None,
    copies: Int[Tensor, "*B C"] | None = None,
    impl: Implementation | None = None,
) -> Float[Tensor, "*B T D"]:
    """:func:`moesaic.experts_mlp` of frozen experts with low-rank adapters (LoRA) on their weights.

    Each weight ``w[e]`` that has an adapter ``(a, b)`` acts as ``w[e] + a[e] b[e]``. It is computed as
    ``x w[e] + (x a[e]) b[e]``, so no matrix of the weight's size is made, in neither pass. The scale of LoRA is not an
    argument: multiply ``b`` by it.

    For the backward pass it keeps its arguments and the pre-activations, ``[T, K, F]`` each, as ``experts_mlp`` does.
    The blocked form is that of ``experts_mlp``. Where ``w`` is cut, its factors are cut: by experts both; of
    ``w1 [W, D, F]`` the columns F are those of ``b``, and ``a`` is whole; of ``w2 [W, F, D]`` the rows F are those of
    ``a``, and ``b`` is whole. Then the gradients of ``a`` of ``w1`` and ``w3`` and of ``b`` of ``w2`` are ``Partial``.

    Args:
        x, topk_ids, topk_weights, w1, w3, w2, activation, b1, b3, b2, copies: see :func:`moesaic.experts_mlp`.
            Weights and biases get no gradient. Quantised weights (:func:`moesaic.ops.quantize`) make this QLoRA.
        lora1, lora3: None, or the factors ``a [W, D, r]`` and ``b [W, r, F]``, of any rank r. One ``a`` may be that of
            both, as in checkpoints with gate and up projection in one tensor.
        lora2: None, or ``a [W, F, r]`` and ``b [W, r, D]``.
        dropout: the share of the numbers of ``x``, and of those of the hidden rows, that are zero in what adapters are
            applied to, as ``lora_dropout`` of peft; the others are divided by ``1 - dropout``. Each copy of a token has
            a mask of its own, which w1 and w3 share.
        keys: with dropout, an int64 number for each copy that decides its mask. Copies with the same key have the same.
            Draw new ones for each step; :func:`moesaic.layers.dropout.copy_keys` does.
        columns: with dropout, the numbers of the hidden columns, int64, for a rank that has some of them. None takes
            ``0 .. F - 1``.
        impl: ``"reference"`` adds the products to the weights, unless there is dropout. Others compute as above, with
            the products of :func:`moesaic.grouped_mm` of this name; None takes the fastest.

    Returns:
        The shape and dtype of ``x``. Of half types, products are accumulated in fp32 and rounded, and the sums of two
        products are made in fp32.

    Under ``torch.autocast`` all is cast to the autocast dtype. Differentiable once, in the tokens, the routing weights
    and the factors; works under ``torch.compile(fullgraph=True)`` and with fake tensors; deterministic.

    Raises:
        ValueError: as :func:`moesaic.experts_mlp`; factors that do not fit; no factors at all; a weight or a bias that
            requires a gradient; a dropout that is no probability below 1, or has no keys, or keys without dropout.
        TypeError: dtypes that do not fit.
        NotImplementedError: under forward-mode differentiation, and for second derivatives.

    Example:
        >>> x, w1, w3, w2 = torch.randn(5, 8), *torch.randn(2, 3, 8, 16), torch.randn(3, 16, 8)
        >>> weights, ids = torch.rand(5, 3).topk(2)
        >>> lora2 = torch.randn(3, 16, 4), torch.zeros(3, 4, 8)
        >>> moesaic.ops.experts_lora(x, ids, weights, w1, w3, w2, lora2=lora2).shape
        torch.Size([5, 8])

    LoRA is Hu et al. 2021 (arXiv 2106.09685).
    """
    weights: dict[str, Any] = {"w1": w1, "w3": w3, "w2": w2}
    quantized = quantized_among(weights)
    plain = weights | dict.fromkeys(quantized)
    check_given(
        x=x, topk_ids=topk_ids, topk_weights=topk_weights, **{n: plain[n] for n in ("w1", "w2") if not quantized}
    )
    check_tensors(w3=plain["w3"], b1=b1, b3=b3, b2=b2, copies=copies)
    check_activation(activation, w3 is not None)
    check_name(impl, IMPLEMENTATIONS)
    base = {"x": x, **plain, "b1": b1, "b3": b3, "b2": b2}
    pairs = {"lora1": lora1, "lora3": lora3, "lora2": lora2}
    factors = _named_factors(pairs)
    given: dict[str, Any] = {name: t for name, t in (base | factors).items() if t is not None}
    refuse_forward_ad("experts_lora", topk_weights, *given.values())
    _check_frozen({name: t for name, t in given.items() if name in base and name != "x"})
    if lora3 is not None and w3 is None:
        raise ValueError("lora3: given without w3; leave it out, or give the projection that it belongs to")
    given = dict(zip(given, autocast(*given.values()), strict=True))
    given |= {name: w.to(given["x"].dtype) for name, w in quantized.items()}
    check_dtypes(given, topk_ids, topk_weights)
    check_shapes({name: t for name, t in given.items() if name in base}, topk_ids, topk_weights)
    check_copies(copies, topk_ids)
    _check_factors(given)

    given |= _mask(dropout, keys, columns, topk_ids, w1)

    in_blocks = x.ndim == 3
    x_BTD, ids_BTK, weights_BTK = (t if in_blocks else t.unsqueeze(0) for t in (given["x"], topk_ids, topk_weights))
    copies_BC = copies if in_blocks or copies is None else copies.unsqueeze(0)
    B, W = x_BTD.shape[0], w1.shape[0]
    like = w1.data if isinstance(w1, QuantizedWeight) else w1
    experts_BG = like.new_empty(B, -(-W // max(B, 1)), dtype=topk_ids.dtype)
    given |= {"x": x_BTD, "ids": ids_BTK, "weights": weights_BTK, "experts": experts_BG}
    if keys is not None and not in_blocks:
        given["keys"] = keys.unsqueeze(0)
    operands = tuple(map(given.get, NAMES))
    if quantized:
        given["copies"] = copies_BC
        z_BTD = lora_op(given, quantized["w1"].format, w1.shape[2], activation, impl, dropout)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in given.values()):
        z_BTD, *_ = torch.ops.moesaic.experts_lora(*operands, activation, impl, dropout, copies_BC)
    else:
        z_BTD = torch.ops.moesaic.experts_lora_inference(*operands, activation, impl, dropout, copies_BC)
    # Not a view: an in-place operation on a view of what an operator made is an error.
    return z_BTD if in_blocks else torch.ops.aten._unsafe_view(z_BTD, x.shape)


def _named_factors(pairs: dict[str, Factors]) -> dict[str, Tensor]:
    if not any(pair is not None for pair in pairs.values()):
        raise ValueError("lora1, lora3, lora2: got no factors; give some, or call moesaic.experts_mlp")
    found = {}
    for name, pair in pairs.items():
        if pair is None:
            continue
        if isinstance(pair, Tensor) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            raise TypeError(f"{name}: expected two tensors, the factors (a, b), got {type(pair).__name__}")
        weight = f"w{name[-1]}"
        found |= {f"{weight}_a": pair[0], f"{weight}_b": pair[1]}
    return found


def _check_frozen(base: dict[str, Tensor]) -> None:
    for name, t in base.items():
        if torch.is_grad_enabled() and t.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, and experts with adapters have none for it; call "
                f"{name}.requires_grad_(False), or train without adapters"
            )


def _mask(
    dropout: float, keys: Tensor | None, columns: Tensor | None, ids: Tensor, w1: Tensor | QuantizedWeight
) -> dict[str, Tensor]:
    """The operands that decide what is dropped, if anything is."""
    check_dropout(dropout)
    if not dropout:
        if keys is not None or columns is not None:
            raise ValueError("keys, columns: are for a dropout, which is 0; leave them out")
        return {}
    if keys is None:
        raise ValueError(f"keys: dropout {dropout} needs a number for each copy; moesaic.layers.dropout draws some")
    F = w1.shape[2]
    if keys.shape != ids.shape or keys.dtype != torch.int64:
        raise ValueError(f"keys: expected int64 {list(ids.shape)}, as topk_ids, got {keys.dtype} {list(keys.shape)}")
    if columns is None:
        columns = torch.arange(F, device=ids.device)
    elif list(columns.shape) != [F] or columns.dtype != torch.int64:
        raise ValueError(f"columns: expected int64 {[F]}, got {columns.dtype} {list(columns.shape)}")
    return {"keys": keys, "columns": columns}


def _check_factors(given: dict[str, Any]) -> None:
    W, D, F = given["w1"].shape
    for factor in FACTORS:
        if factor.name not in given:
            continue
        t, weight = given[factor.name], factor.name[:2]
        r = given[f"{weight}_a"].shape[-1]
        sizes = {"W": W, "D": D, "F": F}
        shape = [sizes.get(dim, r) for dim in factor.dims.split()]
        if list(t.shape) != shape:
            raise ValueError(
                f"lora{weight[1]}: expected {factor.name[-1]} {shape} for {weight} {list(given[weight].shape)} and "
                f"rank {r}, got {list(t.shape)}"
            )
        if t.device != given["x"].device:
            raise ValueError(f"lora{weight[1]}: is on {t.device}, x on {given['x'].device}; move it there")
