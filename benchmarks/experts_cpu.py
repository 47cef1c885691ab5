"""A MoE layer on CPU, in training and in decoding: moesaic against transformers' experts and a dense FFN.

Training: forward and backward of the layer with `impl=None`, gradients reset at each step, with the C library's own
settings and with a warm allocator, which spares the peers their page faults. Decoding: the experts alone, a few tokens
each to 8 of them, with other experts at every step. All implementations run interleaved in one process and medians are
compared. The peak and the bandwidth are measured here; a row's roofline is the larger of the times that its operations
and its bytes need.

    python benchmarks/experts_cpu.py [--quick] [--rounds 3] [--threads 1] [--json benchmarks/results/NAME.json]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import tyro
from as_they_come import QUICK, Results
from grouped_mm_cpu import WARM, Machine, library_of_peak, processor
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moesaic import MoE, MoEConfig, experts_mlp


@dataclass(frozen=True)
class Shape:
    """A layer and how many tokens it gets: E experts, top K, D model dim, F expert hidden dim."""

    name: str
    E: int
    K: int
    D: int
    F: int
    tokens: int

    @property
    def operations(self) -> int:
        """Floating-point operations of a forward pass."""
        return 2 * 3 * self.tokens * self.K * self.D * self.F


SHAPES = (
    Shape("8 wide", 8, 2, 1024, 3584, 2048),
    Shape("64 fine", 64, 8, 1024, 512, 512),
    Shape("128 finer", 128, 8, 1024, 256, 1024),
)
DECODED = (1, 2, 4, 8, 16)
STEPS = 16
OURS, GROUPED, DENSE = "moesaic", "grouped_mm", "dense FFN"
# `eager` is left out in training: its backward is quadratic in the number of experts, and it is slower with 8 of them.
# `batched_mm` copies the weights for each token.
DECODING_PEERS = ("eager", "grouped_mm", "batched_mm")
BATCHED_TOKENS = 2
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed rounds; every implementation runs once a round")] = 3
    threads: Annotated[int, tyro.conf.arg(help="torch threads")] = 1
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="names of shapes to run")] = tuple(s.name for s in SHAPES)
    parts: Annotated[tuple[Literal["training", "decoding"], ...], tyro.conf.arg(help="what to measure")] = (
        "training",
        "decoding",
    )
    allocator: Annotated[
        Literal["default", "warm"] | None,
        tyro.conf.arg(help="measure in this process, with the allocator that it was started with"),
    ] = None
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


class DenseFFN(nn.Module):
    """The gated MLP in which every token meets as many weights as in its experts."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = shape.K * shape.F
        self.w1, self.w3 = (nn.Linear(shape.D, hidden, bias=False, dtype=dtype) for _ in range(2))
        self.w2 = nn.Linear(hidden, shape.D, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


def make_block(shape: Shape, dtype: torch.dtype, implementation: str) -> Any:
    config = Qwen3MoeConfig(
        hidden_size=shape.D,
        moe_intermediate_size=shape.F,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def make_layers(shape: Shape, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same weights in both MoE layers."""
    torch.manual_seed(0)
    block = make_block(shape, dtype, GROUPED)
    moe = MoE(MoEConfig(dim=shape.D, hidden_dim=shape.F, num_experts=shape.E, top_k=shape.K), dtype=dtype)
    w1, w3 = block.experts.gate_up_proj.detach().chunk(2, dim=1)
    with torch.no_grad():
        moe.experts.w1.copy_(w1.mT)
        moe.experts.w3.copy_(w3.mT)
        moe.experts.w2.copy_(block.experts.down_proj.mT)
        moe.router.weight.copy_(block.gate.weight)
    return {OURS: moe, GROUPED: block, DENSE: DenseFFN(shape, dtype)}


def step(layer: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    for parameter in layer.parameters():
        parameter.grad = None


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps for the backward pass, without parameters and x."""
    x = x.detach().requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(kept.values())


def medians(calls: dict[str, Callable[[], Any]], machine: Machine, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for timed in [False] + [True] * rounds:
        for name, call in calls.items():
            taken = machine.seconds(call)
            if timed:
                seconds[name].append(taken)
    return {name: statistics.median(s) for name, s in seconds.items()}


def check_equal(ours: Tensor, theirs: Tensor) -> None:
    """Fast and wrong does not count.

    The median over tokens, since transformers' gate runs in half precision and ours in fp32: near ties go elsewhere.
    """
    errors = (ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
    assert errors.median() < (1e-5 if ours.dtype == torch.float32 else 2e-2), f"error {errors.median():.2g}"


def limits(machine: Machine, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    peak = statistics.median(machine.peak(dtype) for _ in range(rounds))
    return peak, statistics.median(machine.bandwidth() for _ in range(rounds))


def roofline(operations: float, moved: float, peak: float, bandwidth: float, seconds: float) -> dict[str, Any]:
    needed = {"compute": operations / peak, "memory": moved / bandwidth}
    return {
        "operations": operations,
        "bytes": moved,
        "of_peak": operations / seconds / peak,
        "roofline": max(needed, key=lambda limit: needed[limit]),
        "of_roofline": max(needed.values()) / seconds,
    }


def train(shape: Shape, dtype: torch.dtype, machine: Machine, options: Options) -> dict[str, Any]:
    layers = make_layers(shape, dtype)
    x = torch.randn(1, shape.tokens, shape.D, dtype=dtype)
    with torch.no_grad():
        check_equal(layers[OURS](x), layers[GROUPED](x))
    peak, bandwidth = limits(machine, dtype, options.rounds)
    calls = {name: (lambda layer=layer: step(layer, x)) for name, layer in layers.items()}
    seconds = medians(calls, machine, options.rounds)
    saved = {name: saved_bytes(layers[name], x) for name in (OURS, GROUPED)}
    # Weights are read in both passes and their gradients written; so are the pre-activations; tokens come and go twice.
    weights, rows = 3 * shape.E * shape.D * shape.F, shape.tokens * shape.K
    moved = dtype.itemsize * (3 * weights + 2 * 2 * rows * shape.F + 4 * shape.tokens * shape.D)
    return {
        "what": "forward+backward",
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": options.threads,
        "allocator": options.allocator,
        "tokens_per_s": {name: shape.tokens / s for name, s in seconds.items()},
        "ratio": seconds[GROUPED] / seconds[OURS],
        "against_dense": seconds[DENSE] / seconds[OURS],
        "saved_bytes": saved,
        "saved": saved[OURS] / saved[GROUPED],
        **roofline(3 * shape.operations, moved, peak, bandwidth, seconds[OURS]),
    }


def decoding_calls(
    shape: Shape, dtype: torch.dtype, blocks: dict[str, Any], ids: list[Tensor]
) -> dict[str, Callable[[], list[Tensor]]]:
    """The same steps by each implementation that is worth timing."""
    first, tokens = blocks[GROUPED], shape.tokens
    w1, w3 = (w.mT.contiguous() for w in first.gate_up_proj.detach().chunk(2, dim=1))
    w2 = first.down_proj.detach().mT.contiguous()
    x, weights = torch.randn(tokens, shape.D, dtype=dtype), torch.rand(tokens, shape.K).softmax(-1).to(dtype)
    calls: dict[str, Callable[[], list[Tensor]]] = {
        OURS: lambda: [experts_mlp(x, i, weights, w1, w3, w2) for i in ids],
    }
    for name, block in blocks.items():
        if name != "batched_mm" or tokens <= BATCHED_TOKENS:
            calls[name] = lambda block=block: [block(x, i, weights) for i in ids]
    return calls


def decode(shape: Shape, dtype: torch.dtype, machine: Machine, options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    blocks = {name: make_block(shape, dtype, name).experts for name in DECODING_PEERS}
    for block in blocks.values():
        block.gate_up_proj, block.down_proj = blocks[GROUPED].gate_up_proj, blocks[GROUPED].down_proj
    peak, bandwidth = limits(machine, dtype, options.rounds)
    ids = [torch.stack([torch.randperm(shape.E)[: shape.K] for _ in range(shape.tokens)]) for _ in range(STEPS)]
    with torch.no_grad():
        calls = decoding_calls(shape, dtype, blocks, ids)
        check_equal(calls[OURS]()[0], calls[GROUPED]()[0])
        seconds = {name: s / STEPS for name, s in medians(calls, machine, options.rounds).items()}
    moved = sum(len(i.unique()) for i in ids) / STEPS * 3 * shape.D * shape.F * dtype.itemsize
    best = min((s, name) for name, s in seconds.items() if name != OURS)
    return {
        "what": f"decode, {shape.tokens} token{'s'[: shape.tokens != 1]}",
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": options.threads,
        "allocator": options.allocator,
        "tokens_per_s": {name: shape.tokens / s for name, s in seconds.items()},
        "best_peer": best[1],
        "ratio": best[0] / seconds[OURS],
        "of_bandwidth": moved / seconds[OURS] / bandwidth,
        **roofline(shape.operations, moved, peak, bandwidth, seconds[OURS]),
    }


def measure(options: Options, results: Results) -> None:
    torch.set_num_threads(options.threads)
    machine = Machine(options.threads)
    results.about["of_peak"] = library_of_peak(machine, options.rounds)
    decoded = DECODED[:1] if options.quick else DECODED
    for shape in (s for s in SHAPES if s.name in options.shapes):
        shape = replace(shape, tokens=shape.tokens // 8) if options.quick else shape
        for dtype in DTYPES:
            if "training" in options.parts:
                results.add(train(shape, dtype, machine, options))
            if "decoding" in options.parts and shape.K == 8 and options.allocator == "warm":
                for tokens in decoded:
                    results.add(decode(replace(shape, tokens=tokens), dtype, machine, options))


def measure_with_both_allocators(options: Options, results: Results) -> None:
    """Each in a process of its own: the C library reads its settings when one starts."""
    for allocator, settings in (("default", {}), ("warm", WARM)):
        if allocator == "default" and "training" not in options.parts:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            arguments = [*sys.argv, "--allocator", allocator, "--json", str(file)]
            process = subprocess.Popen([sys.executable, *arguments], env=os.environ | settings)
            try:
                process.wait()
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                raise
            finally:
                if file.exists():
                    part = json.loads(file.read_text())
                    results.about["of_peak"] = part["of_peak"]
                    results.rows += part["rows"]  # printed there
                    results.write()
            if process.returncode:
                sys.exit(process.returncode)


def cells(row: dict[str, Any]) -> list[str]:
    found = [row["shape"]["name"], row["what"], row["dtype"], row["allocator"]]
    found += [f"{row['tokens_per_s'][OURS]:,.0f}", row.get("best_peer", GROUPED), f"{row['ratio']:.2f}x"]
    for name, text in (("against_dense", "{:.2f}x"), ("saved", "{:.2f}"), ("of_bandwidth", "{:.2f}")):
        found.append(text.format(row[name]) if name in row else "")
    return [*found, f"{row['of_peak']:.2f}", row["roofline"], f"{row['of_roofline']:.2f}"]


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in ("shape", "what", "dtype", "allocator"):
        table.add_column(column)
    for column in (
        "tokens/s",
        "against",
        "ratio",
        "dense FFN",
        "saved",
        "of bandwidth",
        "of peak",
        "roofline",
        "of it",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=170).print(table)


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, rounds=1, shapes=("128 finer",))
    record = {
        "what": "MoE layer on CPU",
        "rounds": options.rounds,
        "processor": processor(),
        "load": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with Results(options.json, record, lambda row: "  ".join(filter(None, cells(row)))) as results:
        (measure if options.allocator else measure_with_both_allocators)(options, results)
    if options.allocator:
        sys.exit(130 if results.stopped else 0)
    show(results.rows, f"MoE layer on CPU, {options.threads} thread(s), median of {options.rounds} rounds")
    if "of_peak" in record:
        print(f"{processor()['vendor']}: torch's fp32 product has {record['of_peak']:.2f} of the peak")
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
