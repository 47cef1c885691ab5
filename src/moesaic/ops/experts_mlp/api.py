"""The public function ``experts_mlp``: its contract and its checks."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.ops.arguments import check_given, check_tensors
from moesaic.ops.autocast import autocast
from moesaic.ops.dtypes import FLOATS, INDICES
from moesaic.ops.experts_mlp.activation import Activation, check_activation
from moesaic.ops.experts_mlp.implementations import IMPLEMENTATIONS
from moesaic.ops.experts_mlp.main_grads import MainGrads, check_main_grads, experts_mlp_into
from moesaic.ops.experts_mlp.operands import NAMES, OPERANDS, UP
from moesaic.ops.forward_ad import refuse_forward_ad
from moesaic.ops.grouped_mm.implementations import Implementation
from moesaic.ops.implementations import check_name
from moesaic.ops.quantized.check import quantized_among
from moesaic.ops.quantized.experts import experts_op
from moesaic.ops.quantized.weight import QuantizedWeight, Weight


def experts_mlp(
    x: Float[Tensor, "*B T D"],
    topk_ids: Int[Tensor, "*B T K"],
    topk_weights: Float[Tensor, "*B T K"],
    w1: Float[Tensor, "W D F"] | QuantizedWeight,
    w3: Float[Tensor, "W D F"] | QuantizedWeight | None,
    w2: Float[Tensor, "W F D"] | QuantizedWeight,
    *,
    activation: Activation = "silu",
    b1: Float[Tensor, "W F"] | None = None,
    b3: Float[Tensor, "W F"] | None = None,
    b2: Float[Tensor, "W D"] | None = None,
    main_grads: MainGrads | None = None,
    copies: Int[Tensor, "*B C"] | None = None,
    impl: Implementation | None = None,
) -> Float[Tensor, "*B T D"]:
    """The routed experts, whole: gather, gated MLP of each token copy's expert, weighted sum over copies.

    ``z[t] = sum over k of topk_weights[t, k] * mlp(x[t], topk_ids[t, k])`` with
    ``mlp(x, e) = (act(x w1[e] + b1[e]) * (x w3[e] + b3[e])) w2[e] + b2[e]``, and without ``w3``
    ``mlp(x, e) = act(x w1[e] + b1[e]) w2[e] + b2[e]``.

    For the backward pass it keeps its arguments (under autocast, as they were cast) and the pre-activations
    ``x w1 + b1`` and ``x w3 + b3``, ``[T, K, F]`` each, and nothing else. Where no gradient is asked for, nothing. With
    ``copies`` it computes and keeps those of the listed copies alone, ``[C, F]`` each.

    **Blocked form**, ``x [B, T, D]``: block ``b`` has experts of its own, ``G = ceil(W / B)`` of them, of which
    ``topk_ids`` are the numbers within the block: ``0`` is matrix ``b * G``. Where ``B`` does not divide ``W`` the last
    blocks have fewer experts, or none. Sharding cuts between blocks, so on DTensors ``Shard(0)`` of every operand is
    expert parallelism, ``Shard(1)`` of ``x``, ``topk_ids`` and ``topk_weights`` is token parallelism, and ``Shard(2)``
    of ``w1``, ``w3`` with ``Shard(1)`` of ``w2`` is tensor parallelism, all without communication.

    Args:
        x: tokens, fp64, fp32, bf16 or fp16.
        topk_ids: the experts of each token, int32 or int64. Ids that are not those of an expert mark copies that are
            not here (of experts on other ranks, say): they add nothing.
        topk_weights: of any float dtype.
        w1, w3: gate and up projections, of the dtype of ``x``, any strides: an ``[E, F, D]`` checkpoint is used as
            ``w.mT``, and every second column of a matrix that has both interleaved as ``w[..., ::2]``. ``w3=None``
            for an MLP without gate. Or all weights quantised (:func:`moesaic.ops.quantize`), which are frozen: there
            are gradients of everything else.
        w2: down projections.
        activation: one of ``moesaic.ops.ACTIVATIONS``; ``"silu"`` with ``w3`` is SwiGLU. ``moesaic.ops.gated`` computes
            it alone.
        b1, b3, b2: biases. ``b2`` is replicated where ``w2`` is split by rows: it is then counted once.
        main_grads: buffers for the gradients of ``w1``, ``w3`` and ``w2``, of their shapes, fp32 (fp64 for fp64),
            contiguous or the ``.mT`` of what is. The backward pass adds the gradients to them, with no rounding to the
            weights' dtype, and autograd gets none: a weight's ``.grad`` stays as it is, and its hooks are not called.
            For gradients accumulated over several backward passes ("main gradients", as Megatron keeps them with
            ``gradient_accumulation_fusion``). The ``cpu`` and ``triton`` kernels need no memory of the weights' size
            for it. An expert without tokens keeps its values. Plain tensors only; ``torch.compile`` leaves
            the call uncompiled.

            With Megatron's ``main_grad`` give ``tuple(w.main_grad for w in (w1, w3, w2))``, and before each backward
            pass set ``w.grad_added_to_main_grad = True`` and ``w.grad = w.new_empty(1).expand_as(w)`` of each: its hook
            then adds nothing, and drops that stand-in. See "Main gradients" in ``docs/design.md``.
        copies: which copies of tokens are here, where most are not, as on a rank that has few of the experts: the
            numbers ``t * K + k``, each at most once, int32 or int64, -1 for none. In blocks they are numbers within the
            block. A copy that is not listed adds nothing, whatever its id. None: those are here whose ids say so.
        impl: ``"reference"``, ``"torch"``, ``"cpu"`` (kernels for fp32 and bf16, see ``moesaic info``) or ``"triton"``
            (kernels for CUDA in fp32, bf16 and fp16). ``None`` picks the fastest for the device and dtype. A named one
            never falls back.

    Returns:
        The shape and dtype of ``x``. For half types products and the sum over copies are accumulated in fp32; the
        pre-activations and their gated product are rounded to the dtype of ``x``; some implementations also round the
        copies' results, before they are weighed and summed.

    Under ``torch.autocast`` tokens and weights are cast to the autocast dtype. Differentiable once, in everything but
    the ids; works under ``torch.compile(fullgraph=True)`` and with fake tensors; deterministic.

    Raises:
        ValueError: shapes that do not fit, an unknown ``impl`` or ``activation``, or one that needs ``w3`` without it.
        TypeError: dtypes that do not fit, or that the named ``impl`` does not have; ``main_grads`` with DTensors or
            quantised weights; some weights quantised and others not.
        RuntimeError: ``impl="cpu"`` where the kernels were not built or the processor cannot run them;
            ``impl="triton"`` without triton, or off CUDA; ``main_grads`` under
            ``torch.compile(fullgraph=True)``.
        NotImplementedError: under forward-mode differentiation, and for second derivatives.

    Example:
        >>> x, w1, w3, w2 = torch.randn(5, 8), *torch.randn(2, 3, 8, 16), torch.randn(3, 16, 8)
        >>> weights, ids = torch.rand(5, 3).topk(2)
        >>> moesaic.experts_mlp(x, ids, weights, w1, w3, w2).shape
        torch.Size([5, 8])

    The expert of Mixtral and its successors (Shazeer 2020, arXiv 2002.05202, for gated MLPs); the question is
    pytorch/torchtitan issue 434.
    """
    weights: dict[str, Any] = {"w1": w1, "w3": w3, "w2": w2}
    quantized = quantized_among(weights)
    weights |= dict.fromkeys(quantized)
    check_given(
        x=x, topk_ids=topk_ids, topk_weights=topk_weights, **{n: weights[n] for n in ("w1", "w2") if not quantized}
    )
    check_tensors(w3=weights["w3"], b1=b1, b3=b3, b2=b2, copies=copies)
    floating = {"x": x, **weights, "b1": b1, "b3": b3, "b2": b2}
    given: dict[str, Any] = {name: t for name, t in floating.items() if t is not None}
    refuse_forward_ad("experts_mlp", topk_weights, *given.values())
    check_activation(activation, w3 is not None)
    check_name(impl, IMPLEMENTATIONS)
    given = dict(zip(given, autocast(*given.values()), strict=True))
    given |= {name: w.to(given["x"].dtype) for name, w in quantized.items()}
    check_dtypes(given, topk_ids, topk_weights)
    check_shapes(given, topk_ids, topk_weights)
    check_copies(copies, topk_ids)
    if main_grads is not None:
        if quantized:
            raise TypeError("main_grads: quantised weights are frozen and have no gradients; leave it out")
        check_main_grads(main_grads, given)

    tokens = given["x"], topk_ids, topk_weights
    in_blocks = x.ndim == 3
    x_BTD, ids_BTK, weights_BTK = tokens if in_blocks else (t.unsqueeze(0) for t in tokens)
    copies_BC = copies if in_blocks or copies is None else copies.unsqueeze(0)
    B, W = x_BTD.shape[0], w1.shape[0]
    given |= {
        "x": x_BTD,
        "ids": ids_BTK,
        "weights": weights_BTK,
        "experts": (w1.data if isinstance(w1, QuantizedWeight) else w1).new_empty(
            B, -(-W // max(B, 1)), dtype=topk_ids.dtype
        ),
    }
    operands = tuple(map(given.get, NAMES))
    if quantized:
        given["copies"] = copies_BC
        z_BTD = experts_op(given, quantized["w1"].format, w1.shape[2], activation, impl)
    elif not (torch.is_grad_enabled() and any(t.requires_grad for t in given.values())):
        z_BTD = torch.ops.moesaic.experts_mlp_inference(*operands, activation, impl, copies_BC)
    elif main_grads is None:
        z_BTD, *_ = torch.ops.moesaic.experts_mlp(*operands, activation, impl, copies_BC)
    else:
        z_BTD = experts_mlp_into(main_grads, operands, activation, impl, copies_BC)
    # Not a view: an in-place operation on a view of what an operator made is an error.
    return z_BTD if in_blocks else torch.ops.aten._unsafe_view(z_BTD, x.shape)


def check_dtypes(given: Mapping[str, Any], ids: Tensor, weights: Tensor) -> None:
    """Raise ``TypeError`` unless the floating operands have one dtype that is supported."""
    x = given["x"]
    if x.dtype not in FLOATS:
        raise TypeError(f"x: dtype {x.dtype} is not supported; use one of {FLOATS}")
    for name, t in given.items():
        if t.dtype != x.dtype:
            raise TypeError(
                f"{name}: dtype {t.dtype} differs from x's {x.dtype}; cast one of them, or use torch.autocast"
            )
    if weights.dtype not in FLOATS:
        raise TypeError(f"topk_weights: dtype {weights.dtype} is not supported; use one of {FLOATS}")
    if ids.dtype not in INDICES:
        raise TypeError(f"topk_ids: dtype {ids.dtype} is not supported; use int32 or int64")


def check_shapes(given: Mapping[str, Any], ids: Tensor, weights: Tensor) -> None:
    """Raise ``ValueError`` unless shapes and devices fit."""
    x, w1 = given["x"], given["w1"]
    if x.ndim not in (2, 3):
        raise ValueError(
            f"x: expected [T, D] or [B, T, D], got {list(x.shape)}; flatten leading dims with x.flatten(0, -2)"
        )
    if ids.shape[:-1] != x.shape[:-1] or ids.ndim != x.ndim:
        raise ValueError(
            f"topk_ids: expected [{', '.join(map(str, x.shape[:-1]))}, K] to match x, got {list(ids.shape)}"
        )
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights: expected {list(ids.shape)} to match topk_ids, got {list(weights.shape)}")
    if w1.ndim != 3:
        raise ValueError(f"w1: expected [E, D, F], got {list(w1.shape)}")
    D, (W, _, F) = x.shape[-1], w1.shape
    if w1.shape[1] != D:
        hint = "; w1 looks transposed, pass w1.mT" if F == D else ""
        raise ValueError(f"w1: expected [E, {D}, F] to match x, got {list(w1.shape)}{hint}")
    sizes = {"W": W, "D": D, "F": F}
    for operand in OPERANDS:
        if operand.name in given and operand.name != "x":
            _check_shape(operand.name, given[operand.name], [sizes[dim] for dim in operand.dims.split()])
    for weight, bias in UP:
        if bias in given and weight not in given:
            raise ValueError(f"{bias}: given without {weight}; leave it out, or give the projection that it belongs to")
    if x.ndim == 3 and x.shape[0] == 0 and W:
        raise ValueError(f"x: no block for {W} experts; give it at least one, of no tokens if there are none")
    for name, t in {**given, "topk_ids": ids, "topk_weights": weights}.items():
        if t.device != x.device:
            raise ValueError(f"{name}: is on {t.device}, x on {x.device}; move it there")


def check_copies(copies: Tensor | None, ids: Tensor) -> None:
    """Raise unless a list of copies fits the ids."""
    if copies is None:
        return
    if copies.dtype not in INDICES:
        raise TypeError(f"copies: dtype {copies.dtype} is not supported; use int32 or int64")
    if copies.ndim != ids.ndim - 1 or copies.shape[:-1] != ids.shape[:-2]:
        expected = ", ".join([*map(str, ids.shape[:-2]), "C"])
        raise ValueError(f"copies: expected [{expected}] for topk_ids {list(ids.shape)}, got {list(copies.shape)}")
    if copies.device != ids.device:
        raise ValueError(f"copies: is on {copies.device}, topk_ids on {ids.device}; move it there")


def _check_shape(name: str, t: Weight, shape: list[int]) -> None:
    if list(t.shape) != shape:
        hint = f"; {name} looks transposed, pass {name}.mT" if t.ndim == 3 and list(t.mT.shape) == shape else ""
        raise ValueError(f"{name}: expected {shape} to match x and w1, got {list(t.shape)}{hint}")
