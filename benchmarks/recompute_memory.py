"""Memory and speed of a training step with each way to recompute, by torch's own accounting.

    python benchmarks/recompute_memory.py [--quick] [--tokens 1024] [--json benchmarks/results/NAME.json]

A Qwen3-MoE decoder in fp32 on two ranks (dp 2, ep 2), each with its own tokens. ``kept`` is what a rank holds for the
backward pass when the forward pass is done, ``peak`` the most that a step allocates beside weights, gradients included,
both as `torch.profiler` records torch's allocator, and of each the larger of the two ranks. Steps of all ways take
turns, and the time of a way is its shortest step.
"""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from as_they_come import QUICK, Results
from grouped_mm_cpu import processor
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe

RANKS, LAYOUT = 2, {"ep": 2}
WAYS = ("none", "experts", "selective", "full")
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 192,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    tokens: Annotated[int, tyro.conf.arg(help="tokens of a rank")] = 1024
    rounds: Annotated[int, tyro.conf.arg(help="timed steps of each way")] = 7
    json: Annotated[Path | None, tyro.conf.arg(help="also write the results there")] = None


@dataclass(frozen=True)
class Result:
    """Bytes of the rank that has most, and tokens a second of both ranks together."""

    recompute: str
    tokens: int
    kept: int
    peak: int
    tokens_per_second: float


def make_model(way: Any, layout: dict[str, int]) -> Any:
    torch.manual_seed(0)
    model = swap_moe(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, use_cache=False)))
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    return moesaic.parallelize(model.train(), meshes, compute="local", recompute=way)


def allocated(profile: Any, trace: Path) -> list[int]:
    """Bytes that are there after each change, more than before the first."""
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events = sorted((e for e in events if e["args"]["Device Type"] == 0), key=lambda e: e["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return [e["args"]["Total Allocated"] - before for e in events]


def profiler() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def step(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def kept_and_peak(model: Any, ids: torch.Tensor, trace: Path) -> list[int]:
    """Bytes after a forward pass, and the most of a step, of the rank that has most of each. Collective."""
    step(model, ids)
    with profiler() as profile:
        loss = model(input_ids=ids, labels=ids).loss
    kept = allocated(profile, trace)[-1]
    loss.backward()
    model.zero_grad()
    del loss
    with profiler() as profile:
        step(model, ids)
    most = torch.tensor([kept, max(allocated(profile, trace))])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def run_rank(rank: int, folder: str, options: Options) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    models = {way: make_model(way, LAYOUT) for way in WAYS}
    torch.manual_seed(rank)
    length = 256
    ids = torch.randint(SIZES["vocab_size"], (options.tokens // length, length))

    trace = Path(folder) / f"trace-{rank}.json"
    memory = {way: kept_and_peak(model, ids, trace) for way, model in models.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, model in models.items():
            dist.barrier()
            start = time.perf_counter()
            step(model, ids)
            dist.barrier()
            times[way].append(time.perf_counter() - start)
    rate = RANKS * options.tokens
    results = [Result(way, options.tokens, *memory[way], rate / min(times[way])) for way in WAYS]
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps([asdict(result) for result in results]))
    dist.barrier()
    dist.destroy_process_group()


def cells(row: dict[str, Any], none: dict[str, Any]) -> list[str]:
    kept, peak, speed = (f"{row[k] / none[k]:.2f}" for k in ("kept", "peak", "tokens_per_second"))
    megabytes = [f"{row['kept'] / 1e6:.1f} ({kept})", f"{row['peak'] / 1e6:.1f} ({peak})"]
    return [row["recompute"], *megabytes, f"{row['tokens_per_second']:,.0f} ({speed})"]


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, tokens=256, rounds=2)
    about = {"processor": processor(), "sizes": SIZES, "ranks": RANKS, "layout": LAYOUT}
    as_text = lambda row: "  ".join(map(str, row.values()))  # noqa: E731
    with Results(options.json, about, as_text, key="results") as results, tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (folder, options), nprocs=RANKS)
        results.add(json.loads(Path(folder, "result.json").read_text()))
    table = Table(title=f"MB of a rank of {RANKS}, {options.tokens} tokens each; in brackets: of none")
    for column in ("recompute", "kept after forward", "peak of a step", "tokens a second"):
        table.add_column(column)
    for row in results.rows:
        table.add_row(*cells(row, results.rows[0]))
    Console().print(table)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
