"""The passes over rows between products that torch makes: ``ops/experts_mlp/passes.py`` says what they compute.

A program has some slots, and reads and writes the rows that their copies have. No atomics: a sum is one program's.

Legend: R rows and slots, F hidden dim.
"""

import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.triton.activation import hidden, hidden_and_slopes
from moesaic.ops.triton.combine import combine

_SLOTS = 4
_COLUMNS = 512


def hidden_rows(
    h1: Tensor,
    h3: Tensor | None,
    b1: Tensor | None,
    b3: Tensor | None,
    ids: Tensor,
    slots: Tensor,
    positions: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, and pre-activations by slot."""
    R, F = h1.shape
    a, nothing = h1.new_empty(R, F), h1.new_empty(0, F)
    kept1 = h1.new_empty(R, F) if save else nothing
    kept3 = h1.new_empty(R, F) if save and h3 is not None else nothing
    if a.numel():
        columns = min(_COLUMNS, triton.next_power_of_2(F))
        bias1, bias3 = (h1.new_empty(0, 0) if b is None else b for b in (b1, b3))
        _hidden_kernel[triton.cdiv(R, _SLOTS), triton.cdiv(F, columns)](
            h1.contiguous(),
            h1 if h3 is None else h3.contiguous(),
            bias1,
            bias3,
            ids,
            positions,
            a,
            kept1,
            kept3,
            R,
            F,
            *bias1.stride(),
            *bias3.stride(),
            IS_GATED=h3 is not None,
            HAS_B1=b1 is not None,
            HAS_B3=b3 is not None,
            SAVE=save,
            ACT=activation,
            BS=_SLOTS,
            BF=columns,
        )
    return a, kept1, kept3


def hidden_gradient(
    ga: Tensor,
    kept1: Tensor,
    kept3: Tensor | None,
    weights: Tensor,
    slots: Tensor,
    positions: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pre-activations, weighted hidden rows, gradients of routing weights."""
    R, F = ga.shape
    gh1, weighted = ga.new_empty(R, F), ga.new_empty(R, F)
    gh3 = ga.new_empty(R if kept3 is not None else 0, F)
    gweights = weights.new_zeros(R, dtype=accumulation_dtype(ga.dtype))
    if ga.numel():
        _hidden_gradient_kernel[(triton.cdiv(R, _SLOTS),)](
            ga.contiguous(),
            kept1.contiguous(),
            kept1 if kept3 is None else kept3.contiguous(),
            weights.contiguous(),
            positions,
            gh1,
            gh3,
            weighted,
            gweights,
            R,
            F,
            IS_GATED=kept3 is not None,
            ACT=activation,
            BS=_SLOTS,
            BF=min(_COLUMNS, triton.next_power_of_2(F)),
        )
    return gh1, gh3, weighted, gweights


def to_tokens(
    y: Tensor,
    plus: Tensor | None,
    weights: Tensor | None,
    biases: Tensor | None,
    ids: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    """Sums over the copies of each token."""
    plus = None if plus is None else plus.contiguous()
    return combine(y.contiguous(), positions.contiguous(), weights, plus=plus, biases=biases, ids=ids.contiguous())


@triton.jit
def _hidden_kernel(
    h1,
    h3,
    b1,
    b3,
    ids,
    positions,
    a,
    kept1,
    kept3,
    R,
    F,
    stride_b1e,
    stride_b1f,
    stride_b3e,
    stride_b3f,
    IS_GATED: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B3: tl.constexpr,
    SAVE: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BF: tl.constexpr,
):
    dtype = a.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    columns = tl.program_id(1) * BF + tl.arange(0, BF)
    row = tl.load(positions + slot, mask=slot < R, other=-1).to(tl.int64)
    is_here = row >= 0
    inside = (columns < F)[None, :]
    mask = is_here[:, None] & inside
    at = (row * F)[:, None] + columns[None, :]
    to = (slot * F)[:, None] + columns[None, :]
    expert = tl.load(ids + slot, mask=is_here, other=0).to(tl.int64)
    gate = tl.load(h1 + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_B1:
        b = b1 + (expert * stride_b1e)[:, None] + (columns.to(tl.int64) * stride_b1f)[None, :]
        gate += tl.load(b, mask=mask, other=0.0).to(tl.float32)
    # The activation is of what is saved, so that the backward pass sees the same.
    gate = gate.to(dtype)
    up = gate
    if IS_GATED:
        wide = tl.load(h3 + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_B3:
            b = b3 + (expert * stride_b3e)[:, None] + (columns.to(tl.int64) * stride_b3f)[None, :]
            wide += tl.load(b, mask=mask, other=0.0).to(tl.float32)
        up = wide.to(dtype)
    if SAVE:
        # Of a copy that is not here nothing was read: zeros.
        tl.store(kept1 + to, gate, mask=(slot < R)[:, None] & inside)
        if IS_GATED:
            tl.store(kept3 + to, up, mask=(slot < R)[:, None] & inside)
    values = hidden(gate.to(tl.float32), up.to(tl.float32), ACT, IS_GATED, dtype.primitive_bitwidth == 16)
    tl.store(a + at, values.to(dtype), mask=mask)


@triton.jit
def _hidden_gradient_kernel(
    ga,
    kept1,
    kept3,
    weights,
    positions,
    gh1,
    gh3,
    weighted,
    gweights,
    R,
    F,
    IS_GATED: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BF: tl.constexpr,
):
    dtype = gh1.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    row = tl.load(positions + slot, mask=slot < R, other=-1).to(tl.int64)
    is_here = row >= 0
    weight = tl.load(weights + slot, mask=is_here, other=0.0).to(tl.float32)[:, None]
    dots = tl.zeros((BS,), tl.float32)
    for f in tl.range(0, F, BF):
        columns = f + tl.arange(0, BF)
        mask = is_here[:, None] & (columns < F)[None, :]
        at = (row * F)[:, None] + columns[None, :]
        of = (slot * F)[:, None] + columns[None, :]
        grad = tl.load(ga + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(kept1 + of, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if IS_GATED:
            up = tl.load(kept3 + of, mask=mask, other=0.0).to(tl.float32)
        a, by_gate, by_up = hidden_and_slopes(gate, up, ACT, IS_GATED, dtype.primitive_bitwidth == 16)
        # The product of the forward pass took the rounded row.
        a = a.to(dtype).to(tl.float32)
        dots += tl.sum(grad * a, 1)
        grad *= weight
        tl.store(weighted + at, (weight * a).to(dtype), mask=mask)
        tl.store(gh1 + at, (grad * by_gate).to(dtype), mask=mask)
        if IS_GATED:
            tl.store(gh3 + at, (grad * by_up).to(dtype), mask=mask)
    tl.store(gweights + slot, dots, mask=slot < R)
