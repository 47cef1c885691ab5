"""The activations of experts_mlp and their derivatives, on fp32 blocks; ``ops/experts_mlp/activation.py`` defines them.

A NaN stays a NaN: it is never the smaller or larger of two numbers, so nothing here takes a maximum.
"""

import triton
import triton.language as tl


@triton.jit
def activate(h, ACT: tl.constexpr):
    if ACT == "silu":
        return h * tl.sigmoid(h)
    elif ACT == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACT == "relu":
        return tl.where(h < 0, 0.0, h)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.where(h < 0, 0.0, h * h)


@triton.jit
def derivative(h, ACT: tl.constexpr):
    if ACT == "silu":
        s = tl.sigmoid(h)
        return s * (1.0 + h * (1.0 - s))
    elif ACT == "gelu":
        density = tl.exp(-0.5 * h * h) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    elif ACT == "gelu_tanh":
        u = 1.5957691216057308 * (h + 0.044715 * h * h * h)
        s = tl.sigmoid(u)
        # 1 - s would keep no digits where s is nearly 1.
        return s + h * s * tl.sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif ACT == "relu":
        return tl.where(h <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.where(h < 0, 0.0, 2.0 * h)
