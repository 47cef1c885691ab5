"""The hidden rows of experts_mlp and their derivatives, on fp32 blocks; ``ops/experts_mlp/activation.py`` defines them.

A NaN stays a NaN: nothing here takes a minimum or maximum without ``propagate_nan``. Those, and no comparison and
selection, for the numbers in flight have hardly a register to spare.

``IS_HALF`` makes a sigmoid of the GPU's approximate exponential and reciprocal, which have 22 bits: for what is stored
in half precision. Those that are exact to the last bit take four times as many instructions. The GPU's tanh would take
one less, but leaves nothing of a sigmoid below 2^-12.
"""

import torch
import triton
import triton.language as tl

_HAS_PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit
def _sigmoid(h, IS_HALF: tl.constexpr):
    if IS_HALF and _HAS_PTX:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [h * -1.44269504], tl.float32, True, 1)
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1)
    else:
        return tl.sigmoid(h)


@triton.jit
def _activate(h, ACT: tl.constexpr, IS_HALF: tl.constexpr):
    if ACT == "silu":
        return h * _sigmoid(h, IS_HALF)
    elif ACT == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return h * _sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h), IS_HALF)
    elif ACT == "relu":
        return tl.where(h < 0, 0.0, h)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.where(h < 0, 0.0, h * h)


@triton.jit
def _derivative(h, ACT: tl.constexpr, IS_HALF: tl.constexpr):
    if ACT == "silu":
        s = _sigmoid(h, IS_HALF)
        return s * (1.0 + h * (1.0 - s))
    elif ACT == "gelu":
        density = tl.exp(-0.5 * h * h) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    elif ACT == "gelu_tanh":
        u = 1.5957691216057308 * (h + 0.044715 * h * h * h)
        s = _sigmoid(u, IS_HALF)
        # 1 - s would keep no digits where s is nearly 1.
        return s + h * s * _sigmoid(-u, IS_HALF) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif ACT == "relu":
        return tl.where(h <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.where(h < 0, 0.0, 2.0 * h)


@triton.jit
def hidden(h1, h3, ACT: tl.constexpr, IS_GATED: tl.constexpr, IS_HALF: tl.constexpr):
    """The hidden rows; ``h3`` is not read without gate."""
    if ACT == "clamped_swiglu":
        tl.static_assert(IS_GATED)
        g = tl.minimum(h1, 7.0, propagate_nan=tl.PropagateNan.ALL)
        return (_clamp(h3) + 1.0) * (g * _sigmoid(1.702 * g, IS_HALF))
    elif IS_GATED:
        return _activate(h1, ACT, IS_HALF) * h3
    else:
        return _activate(h1, ACT, IS_HALF)


@triton.jit
def hidden_and_slopes(h1, h3, ACT: tl.constexpr, IS_GATED: tl.constexpr, IS_HALF: tl.constexpr):
    """The hidden rows, and their derivatives by ``h1`` and ``h3``; the last is of no meaning without gate."""
    if ACT == "clamped_swiglu":
        tl.static_assert(IS_GATED)
        g = tl.minimum(h1, 7.0, propagate_nan=tl.PropagateNan.ALL)
        s = _sigmoid(1.702 * g, IS_HALF)
        act = g * s
        up = _clamp(h3) + 1.0
        slope = up * s * (1.0 + 1.702 * g * (1.0 - s))
        is_inside = (h3 >= -7.0) & (h3 <= 7.0)
        return up * act, tl.where(h1 <= 7.0, slope, 0.0), tl.where(is_inside, act, 0.0)
    else:
        act = _activate(h1, ACT, IS_HALF)
        slope = _derivative(h1, ACT, IS_HALF)
        if IS_GATED:
            return act * h3, slope * h3, act
        else:
            return act, slope, act


@triton.jit
def _clamp(h):
    return tl.clamp(h, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
