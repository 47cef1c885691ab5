"""Proofs of the operators with quantised weights, as a program: without run-time type checks they are fast.

Takes the name of a proof and the sizes of axes; prints JSON: the placements of what is wrong, stuck and missing.
"""

import json
import sys

import torch
from torch import Tensor

import moesaic
from moesaic.ops.quantized import quantize
from tests.sharding.proofs_of_ours import FEWER, FLAT, SIZES, as_text, random

ops = torch.ops.moesaic

# Format, summed dim: one scale, blocks (of which the axis can have a few), and blocks that run over the ends of rows.
WEIGHTS = (("int8", 13), ("nf4", 256), ("mxfp4", 128), ("nf4", 13))
# Format, model dim, hidden dim: of the blocks none, those of w2, those of w1, or all run on.
EXPERTS = (("int8", 6, 7), ("nf4", 64, 256), ("mxfp4", 32, 96), ("nf4", 64, 12), ("nf4", 12, 64), ("nf4", 6, 7))
N = 14


def products() -> dict:
    forms = {"flat": (FLAT, 11, 4), "own": (SIZES, 24, 12), "fewer": (FEWER, 24, 10), "shared": (SIZES, 24, 3)}
    calls = {}
    for format, inner in WEIGHTS:
        for form, (sizes, rows, num_weights) in forms.items():
            w = quantize(random(num_weights, inner, N), format)
            name, weight = f"{form}, {format}, {inner}", (w.data, w.scales, sizes, format)
            calls[f"quantized_mm, {name}"] = ops.quantized_mm, (random(rows, inner), *weight, N, None)
            if form != "fewer":
                calls[f"input_grad, {name}"] = ops.quantized_mm_input_grad, (random(rows, N), *weight, inner, None)
    return calls


def experts() -> dict:
    calls = {}
    for format, D, F in EXPERTS:
        for form, (B, W) in {"biased": (2, 6), "fewer": (4, 11)}.items():
            flags, name = (format, F, "silu", None), f"{form}, {format}, {D} x {F}"
            operands = quantized_operands(format, D, F, B, W, biased=form == "biased")
            calls[f"experts, {name}"] = ops.quantized_experts_mlp, (*operands, *flags)
            calls[f"inference, {name}"] = ops.quantized_experts_mlp_inference, (*operands, *flags)
            if form == "biased":
                pairs = ((W, D, 3), (W, 3, F), (W, D, 2), (W, 2, F), (W, F, 2), (W, 2, D))
                factors = tuple(random(*shape) / 8 + i / 50 for i, shape in enumerate(pairs))
                # With dropout.
                ids = operands[1]
                adapters = (*factors, torch.arange(ids.numel()).view(ids.shape), torch.arange(F))
                of_lora = (*operands, *adapters, *flags, 0.3)
                calls[f"lora, {name}"] = ops.quantized_experts_lora_inference, of_lora
                _, *kept = ops.quantized_experts_lora(*of_lora)
                of_lora = (random(*operands[0].shape).flip(0), *operands, *adapters, *kept, *flags, 0.3, [True] * 8)
                calls[f"backward of lora, {name}"] = ops.quantized_experts_lora_backward, of_lora
                _, *pre = ops.quantized_experts_mlp(*operands, *flags)
                grad = random(*operands[0].shape).flip(0)
                everything = (grad, *operands, *pre, *flags, [True] * 5)
                calls[f"backward, {name}"] = ops.quantized_experts_mlp_backward, everything
    return calls


def quantized_operands(format: str, D: int, F: int, B: int, W: int, *, biased: bool) -> tuple[Tensor | None, ...]:
    tokens, copies, G = 5, 3, 3
    ids = torch.randint(-1, G, (B, tokens, copies), generator=torch.Generator().manual_seed(1))
    ids[-1] = ids[-1].masked_fill(ids[-1] >= W - (B - 1) * G, -1)  # what the last block does not have
    weights = (random(W, D, F) / D**0.5, random(W, D, F) / D**0.5 + 0.1, random(W, F, D) / F**0.5)
    parts = [t for w in weights for q in [quantize(w, format)] for t in (q.data, q.scales)]
    biases = (random(W, F), random(W, F) + 1, random(W, D)) if biased else (None, None, None)
    return (random(B, tokens, D), ids, random(B, tokens, copies), random(B, G), *parts, *biases)


CALLS = products() | experts()


def prove(name: str, *axes: int) -> dict:
    op, args = CALLS[name]
    backward = not name.startswith(("backward", "input_grad", "inference", "lora"))
    report = moesaic.prove(op, *args, make_up=False, axes=axes, meshes=[], backward=backward)
    return {kind: as_text(getattr(report, kind)) for kind in ("admitted", "wrong", "stuck", "missing")}


if __name__ == "__main__":
    name, *axes = sys.argv[1:]
    print(json.dumps(prove(name, *map(int, axes))))
