"""grouped_mm alone on a GPU: ``impl="triton"`` against ``torch._grouped_mm`` (``impl="torch"``) and a loop of cuBLAS.

Compared with fp32 before it is timed, in memory filled with NaN. Writes ``benchmarks/results/grouped_mm_DEVICE.json``.

    python -m benchmarks.gpu.grouped_mm [--dry-run]
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import tyro
from benchmarks.gpu import common
from benchmarks.gpu.common import DEVICE
from benchmarks.gpu.shapes import ROUTINGS, SHAPES, Options, Shape, route
from torch import Tensor

DTYPE = torch.bfloat16
OURS, BASE, LOOP = "triton", "torch", "cuBLAS loop"
Passes = dict[str, Callable[[], Tensor]]


def passes(x: Tensor, w: Tensor, grad: Tensor, sizes: Tensor) -> dict[str, Passes]:
    """Forward, input gradient and weight gradient of each contender."""
    ops = torch.ops.moesaic
    found: dict[str, Passes] = {}
    for name in (OURS, BASE):
        found[name] = {
            "forward": lambda name=name: ops.grouped_mm(x, w, sizes, name),
            "input gradient": lambda name=name: ops.grouped_mm_input_grad(grad, w, sizes, name),
            "weight gradient": lambda name=name: ops.grouped_mm_weight_grad(x, grad, sizes, w, name),
        }
    ends = sizes.cumsum(0).tolist()
    rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    found[LOOP] = {
        "forward": lambda: torch.cat([x[r] @ w[e] for e, r in enumerate(rows)]),
        "input gradient": lambda: torch.cat([grad[r] @ w[e].mT for e, r in enumerate(rows)]),
        "weight gradient": lambda: torch.stack([x[r].mT @ grad[r] for r in rows]),
    }
    return found


def truth(x: Tensor, w: Tensor, grad: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """In fp32, expert by expert."""
    ends = sizes.cumsum(0).tolist()
    rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return {
        "forward": torch.cat([x[r].float() @ w[e].float() for e, r in enumerate(rows)]),
        "input gradient": torch.cat([grad[r].float() @ w[e].float().mT for e, r in enumerate(rows)]),
        "weight gradient": torch.stack([x[r].float().mT @ grad[r].float() for r in rows]),
    }


def measure(shape: Shape, tokens: int, routing: str, options: Options) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ids, _ = route(shape, tokens, routing)
    sizes = torch.bincount(ids.flatten(), minlength=shape.E)
    num_rows = ids.numel()
    x, grad = (torch.randn(num_rows, n, device=DEVICE, dtype=DTYPE) for n in (shape.D, shape.F))
    w = torch.randn(shape.E, shape.D, shape.F, device=DEVICE, dtype=DTYPE) * shape.D**-0.5
    found, expected = passes(x, w, grad, sizes), truth(x, w, grad, sizes)
    rows = []
    for label in expected:
        row: dict[str, Any] = {"shape": shape.name, "rows a group": num_rows / shape.E, "routing": routing}
        row["pass"] = label
        for name, contender in found.items():
            with common.poisoned():
                result = contender[label]()
            wrong = common.error(result, expected[label])
            assert wrong < 1e-2, f"{name}, {label}: relative error {wrong:.2g}"
            row[f"{name} ms"] = common.milliseconds(contender[label], options.rounds)
        assert torch.equal(found[OURS][label](), found[OURS][label]()), f"{label}: two runs differ"
        row["ratio"] = row[f"{BASE} ms"] / row[f"{OURS} ms"]
        row["TFLOP/s"] = 2 * num_rows * shape.D * shape.F / row[f"{OURS} ms"] / 1e9
        rows.append(row)
    return rows


def main(options: Options) -> list[dict[str, Any]]:
    """Measure, print and save; gives back what was aimed at and what was reached."""
    common.require_gpu()
    ceilings, rows = common.ceilings(options.rounds), []
    for shape in (s for s in SHAPES if s.name in options.shapes):
        for tokens in options.tokens:
            for routing in ROUTINGS:
                rows += measure(shape, tokens, routing, options)
    common.show("grouped_mm, bf16", rows)
    small = [r["ratio"] for r in rows if r["rows a group"] <= 64]
    aims = [common.verdict("grouped_mm, groups of <= 64 rows, x torch", 1.3, small)] if small else []
    common.show("Aims", aims)
    record = {"what": "grouped_mm on a GPU", "rounds": options.rounds, "ceilings": ceilings, "aims": aims}
    common.save("grouped_mm", record | {"shapes": [asdict(s) for s in SHAPES], "rows": rows})
    return aims


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
