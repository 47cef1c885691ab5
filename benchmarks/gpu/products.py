"""A row of the three grouped products alone: ``impl="triton"``, ``torch._grouped_mm`` and a loop of cuBLAS."""

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu import common
from benchmarks.gpu.common import DEVICE
from benchmarks.gpu.layer import OURS, TORCH, WrongError
from benchmarks.gpu.shapes import Shape, route
from torch import Tensor

LOOP = "cuBLAS loop"
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = PASSES = ("forward", "input gradient", "weight gradient")


def contenders(x: Tensor, w: Tensor, grad: Tensor, sizes: Tensor) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """For each pass, who computes it."""
    ops = torch.ops.moesaic
    ends = sizes.cumsum(0).tolist()
    rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    found: dict[str, dict[str, Callable[[], Tensor]]] = {
        FORWARD: {LOOP: lambda: torch.cat([x[r] @ w[e] for e, r in enumerate(rows)])},
        INPUT_GRADIENT: {LOOP: lambda: torch.cat([grad[r] @ w[e].mT for e, r in enumerate(rows)])},
        WEIGHT_GRADIENT: {LOOP: lambda: torch.stack([x[r].mT @ grad[r] for r in rows])},
    }
    for impl in (OURS, TORCH):
        found[FORWARD][impl] = lambda impl=impl: ops.grouped_mm(x, w, sizes, impl)
        found[INPUT_GRADIENT][impl] = lambda impl=impl: ops.grouped_mm_input_grad(grad, w, sizes, impl)
        found[WEIGHT_GRADIENT][impl] = lambda impl=impl: ops.grouped_mm_weight_grad(x, grad, sizes, w, impl)
    return found


def truth(x: Tensor, w: Tensor, grad: Tensor, sizes: Tensor, label: str) -> Tensor:
    """In fp32, expert by expert."""
    found, start = [], 0
    for e, size in enumerate(sizes.tolist()):
        rows = slice(start, start + size)
        start += size
        if label == FORWARD:
            found.append(x[rows].float() @ w[e].float())
        elif label == INPUT_GRADIENT:
            found.append(grad[rows].float() @ w[e].float().mT)
        else:
            found.append(x[rows].float().mT @ grad[rows].float())
    return (torch.stack if label == WEIGHT_GRADIENT else torch.cat)(found)


def measure(row: dict[str, Any], shape: Shape, tokens: int, routing: str) -> None:
    """Fill the row, as far as it gets."""
    torch.manual_seed(0)
    ids, _ = route(shape, tokens, routing)
    sizes = torch.bincount(ids.flatten(), minlength=shape.E)
    num_rows = ids.numel()
    row["rows a group"] = num_rows / shape.E
    x, grad = (torch.randn(num_rows, n, device=DEVICE, dtype=torch.bfloat16) for n in (shape.D, shape.F))
    w = torch.randn(shape.E, shape.D, shape.F, device=DEVICE, dtype=torch.bfloat16) * shape.D**-0.5
    # The one that is furthest from the peak first.
    for label, found in reversed(contenders(x, w, grad, sizes).items()):
        expected = truth(x, w, grad, sizes, label)
        for name, run in found.items():
            with common.poisoned():
                result = run()
            wrong = common.error(result, expected)
            if not wrong < 1e-2:
                raise WrongError(f"{name}, {label}: relative error {wrong:.2g}")
            if name == OURS and not torch.equal(result, run()):
                raise WrongError(f"{label}: two runs differ")
            row[f"{label} {name} ms"] = common.milliseconds(run)
        row[f"{label} x torch"] = row[f"{label} {TORCH} ms"] / row[f"{label} {OURS} ms"]
        row[f"{label} TFLOP/s"] = 2 * num_rows * shape.D * shape.F / row[f"{label} {OURS} ms"] / 1e9
