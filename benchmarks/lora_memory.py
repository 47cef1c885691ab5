"""Memory of a training step of adapters on four ranks, by torch's own accounting: the base in bf16, and quantised.

    python benchmarks/lora_memory.py [--quick] [--tokens 512] [--json benchmarks/results/NAME.json]

One layer on (ep 2, etp 2), AdamW on the adapters. ``held`` is what a rank keeps between steps: weights, adapters and
the state of the optimizer. ``step`` is the most that a step allocates beside it, of torch's allocator as
`torch.profiler` records it. So what kernels allocate inside counts, too. Of each the largest of the ranks.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from as_they_come import QUICK, Results, print_table
from grouped_mm_cpu import processor
from torch.distributed.tensor import DTensor

import moesaic
from moesaic.layers import quantize_
from moesaic.layers.lora import ExpertsAdapter, Rank, add_adapter

RANKS, LAYOUT = 4, {"ep": 2, "etp": 2}
EXPERTS, TOP_K, DIM, HIDDEN, RANK = 16, 2, 512, 1024, 8
BASES = ("bf16", "int8", "nf4", "mxfp4")


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    tokens: Annotated[int, tyro.conf.arg(help="tokens of a rank")] = 512
    json: Annotated[Path | None, tyro.conf.arg(help="also write the results there")] = None


@dataclass(frozen=True)
class Result:
    """Bytes of the rank that has most: of the experts' weights, of all that is held, and of a step beside it."""

    base: str
    tokens: int
    weights: int
    held: int
    step: int


def make_layer(base: str) -> Any:
    torch.manual_seed(0)
    moe = moesaic.MoE(moesaic.MoEConfig(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS, top_k=TOP_K))
    moe = moe.to(torch.bfloat16).requires_grad_(False)
    if base != "bf16":
        quantize_(moe, base)
    ranks = {weight: Rank(RANK, 2.0) for weight in ("w1", "w3", "w2")}
    add_adapter(moe.experts, "default", ExpertsAdapter(moe.experts, ranks, dtype=torch.float32))
    return moesaic.parallelize(moe, moesaic.build_meshes(**LAYOUT, device_type="cpu"), compute="local")


def bytes_of(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def step_of(moe: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    moe(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def most_allocated(trace: Path) -> int:
    """The most bytes that were there at one time, of those that came since the profiler began."""
    events = json.loads(trace.read_text())["traceEvents"]
    return max(
        e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0
    )


def run_rank(rank: int, folder: str, base: str, tokens: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    moe = make_layer(base)
    trained = [p for p in moe.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    x = torch.randn(tokens, DIM, dtype=torch.bfloat16)
    step_of(moe, optimizer, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step_of(moe, optimizer, x)
    trace = Path(folder) / f"trace-{rank}.json"
    profile.export_chrome_trace(str(trace))
    factors = {id(p) for p in trained}
    experts = [t for t in [*moe.experts.parameters(), *moe.experts.buffers()] if id(t) not in factors]
    state = [t for of_one in optimizer.state.values() for t in of_one.values() if isinstance(t, torch.Tensor)]
    held = bytes_of([*moe.parameters(), *moe.buffers(), *state])
    found = torch.tensor([bytes_of(experts), held, most_allocated(trace)])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(found.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: Options) -> Iterator[Result]:
    for base in BASES:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, (folder, base, options.tokens), nprocs=RANKS)
            yield Result(base, options.tokens, *json.loads(Path(folder, "result.json").read_text()))


def cells(row: dict[str, Any]) -> list[str]:
    megabytes = (row["weights"], row["held"], row["step"], row["held"] + row["step"])
    return [row["base"], str(row["tokens"]), *(f"{number / 1e6:.1f}" for number in megabytes)]


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, tokens=64)
    about = {"processor": processor()}
    with Results(options.json, about, lambda row: "  ".join(cells(row)), key="results") as results:
        for result in measure(options):
            results.add(asdict(result))
    title = f"MB of a rank of {RANKS}: {EXPERTS} experts of {DIM} x {HIDDEN}, adapters of rank {RANK}"
    print_table(title, ("base", "tokens", "weights", "held", "step", "at most"), map(cells, results.rows))
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
