"""The public function ``grouped_mm``: its contract and its checks."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.ops.arguments import check_given
from moesaic.ops.autocast import autocast
from moesaic.ops.dtypes import FLOATS, INDICES
from moesaic.ops.forward_ad import refuse_forward_ad
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS, Implementation
from moesaic.ops.grouped_mm.ops import grouped_mm_op
from moesaic.ops.implementations import check_name
from moesaic.ops.quantized.ops import product_op
from moesaic.ops.quantized.weight import QuantizedWeight


def grouped_mm(
    x: Float[Tensor, "R K"],
    w: Float[Tensor, "W K N"] | QuantizedWeight,
    group_sizes: Int[Tensor, " E"] | Int[Tensor, "B G"],
    *,
    impl: Implementation | None = None,
    out_dtype: torch.dtype | None = None,
) -> Float[Tensor, "R N"]:
    """Multiply consecutive groups of rows of ``x`` each by its own matrix.

    ``y[r] = x[r] @ w[e]`` for every row ``r`` of group ``e``; rows past the last group are zero, in ``y`` and in the
    gradient of ``x``.

    **Flat form**, ``group_sizes [E]``: group ``e`` is the next ``group_sizes[e]`` rows and meets ``w[e]``.

    **Blocked form**, ``group_sizes [B, G]``: ``x`` is ``B`` equal blocks of ``C = R / B`` rows. Block ``b`` holds ``G``
    groups from its first row on, and padding after them. Either the blocks share their experts, ``w [G, K, N]``, or
    each has its own, ``w [W, K, N]`` with ``G = ceil(W / B)``: group ``g`` of block ``b`` meets ``w[b * G + g]``. Where
    ``B`` does not divide ``W`` the last blocks have fewer experts, or none, and groups without expert must be empty.
    Raggedness lives inside a block and sharding cuts between blocks, so on DTensors ``Shard(0)`` of every operand is
    expert parallelism and ``Shard(0)`` of ``x`` and ``group_sizes`` alone is token parallelism, both without
    communication (see ``docs/design.md``).

    Args:
        x: rows, fp64, fp32, bf16 or fp16, any strides.
        w: one matrix a group, of the same dtype; any strides, so an ``[E, N, K]`` checkpoint is used as ``w.mT``. Or a
            quantised weight (:func:`moesaic.ops.quantize`), which is frozen: only ``x`` has a gradient.
        group_sizes: how many rows each group has (counts, not offsets), int32 or int64, on the device of ``x``.
            On CUDA the values are never read to the host; :func:`moesaic.debug_checks` checks them.
        impl: one of :data:`moesaic.ops.Implementation`, which never falls back to another. ``None`` picks the fastest
            that was measured.
        out_dtype: dtype of the result: that of ``x``, or ``torch.float32`` for half-precision operands.

    Returns:
        ``[R, N]``. Half-precision products are accumulated in fp32.

    Under ``torch.autocast`` the operands are cast to the autocast dtype. Differentiable any number of times in ``x``
    and ``w``; works under ``torch.compile(fullgraph=True)``, fake tensors and ``vmap``; deterministic.

    Raises:
        ValueError: shapes that do not fit, an unknown ``impl``, and on CPU sizes that are negative, exceed the rows or
            are those of groups without expert. (On CUDA rows of such groups give zeros.)
        TypeError: dtypes that do not fit, or that the named ``impl`` does not have.
        RuntimeError: ``impl="cpu"`` where the kernels were not built or the processor cannot run them;
            ``impl="triton"`` without triton, or off CUDA.
        NotImplementedError: under forward-mode differentiation.

    Example:
        >>> x, w = torch.randn(6, 4), torch.randn(3, 4, 5)
        >>> moesaic.grouped_mm(x, w, torch.tensor([2, 0, 3])).shape  # row 5 belongs to no group: zero
        torch.Size([6, 5])

    The semantics are those of ``jax.lax.ragged_dot``; the question is pytorch/torchtitan issue 434.
    """
    if isinstance(w, QuantizedWeight):
        return _quantized(x, w, group_sizes, impl, out_dtype)
    check_given(x=x, w=w, group_sizes=group_sizes)
    refuse_forward_ad("grouped_mm", x, w)
    x, w = autocast(x, w)
    check_dtypes(x, w, group_sizes)
    _check_out_dtype(x, out_dtype)
    check_shapes(x, w, group_sizes)
    check_name(impl, IMPLEMENTATIONS)
    return grouped_mm_op(x, w, group_sizes, impl, out_dtype)


def _quantized(
    x: Tensor, w: QuantizedWeight, group_sizes: Tensor, impl: Implementation | None, out_dtype: torch.dtype | None
) -> Tensor:
    check_given(x=x, group_sizes=group_sizes)
    refuse_forward_ad("grouped_mm", x)
    (x,) = autocast(x)
    weight = w.to(x.dtype)
    check_dtypes(x, weight, group_sizes)
    _check_out_dtype(x, out_dtype)
    check_shapes(x, weight, group_sizes)
    check_name(impl, IMPLEMENTATIONS)
    return product_op(x, weight, group_sizes, impl, out_dtype)


def check_dtypes(x: Tensor, other: Tensor | QuantizedWeight, group_sizes: Tensor, name: str = "w") -> None:
    """Raise ``TypeError`` unless operands have one dtype that is supported; ``name`` is that of ``other``."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x: dtype {x.dtype} is not supported; use one of {FLOATS}")
    if other.dtype != x.dtype:
        raise TypeError(
            f"{name}: dtype {other.dtype} differs from x's {x.dtype}; cast one of them, or use torch.autocast"
        )
    if group_sizes.dtype not in INDICES:
        raise TypeError(f"group_sizes: dtype {group_sizes.dtype} is not supported; use int32 or int64")


def _check_out_dtype(x: Tensor, out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in (x.dtype, torch.float32):
        raise TypeError(f"out_dtype: got {out_dtype}; it can be {x.dtype} (that of x) or torch.float32")
    if out_dtype == torch.float32 and x.dtype == torch.float64:
        raise TypeError("out_dtype: torch.float32 would lose the precision of torch.float64 operands; omit it")


def check_shapes(x: Tensor, w: Tensor | QuantizedWeight, group_sizes: Tensor, name: str = "w") -> None:
    """Raise ``ValueError`` unless shapes and devices fit; ``name`` is that of ``w`` in messages."""
    if x.ndim != 2:
        raise ValueError(f"x: expected [R, K], got {list(x.shape)}; flatten leading dims with x.flatten(0, -2)")
    if w.ndim != 3:
        raise ValueError(f"{name}: expected [E, K, N], got {list(w.shape)}")
    if group_sizes.ndim not in (1, 2):
        raise ValueError(f"group_sizes: expected [E] or [B, G], got {list(group_sizes.shape)}")
    if x.shape[1] != w.shape[1]:
        hint = f"; {name} looks transposed, pass {name}.mT" if x.shape[1] == w.shape[2] else ""
        raise ValueError(f"{name}: expected [E, {x.shape[1]}, N] to match x {list(x.shape)}, got {list(w.shape)}{hint}")
    for argument, t in ((name, w), ("group_sizes", group_sizes)):
        if t.device != x.device:
            raise ValueError(f"{argument}: is on {t.device}, x on {x.device}; move it there")
    if group_sizes.ndim == 1:
        if group_sizes.shape[0] != w.shape[0]:
            raise ValueError(
                f"group_sizes: expected one size for each of the {w.shape[0]} matrices of {name}, "
                f"got {group_sizes.shape[0]}"
            )
        return
    (B, G), W = group_sizes.shape, w.shape[0]
    own = G == -(-W // B) if B else W == 0
    if not own and G != W:
        raise ValueError(
            f"group_sizes: {W} matrices of {name} over {B} blocks need {-(-W // max(B, 1))} groups a block "
            f"(each its own) or {W} (shared), got {G}"
        )
    if (x.shape[0] % B if B else x.shape[0]) != 0:
        raise ValueError(f"x: {x.shape[0]} rows are not {B} equal blocks; pad every block to the same number of rows")
