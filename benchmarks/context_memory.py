"""Memory of a training step under context parallelism, by torch's own accounting.

    python benchmarks/context_memory.py [--quick] [--tokens 2048] [--json benchmarks/results/NAME.json]

The decoder of `recompute_memory.py` with one sequence, on one rank and on several that share it (cp and ep). ``kept``
is what a rank holds for the backward pass when the forward pass is done, ``peak`` the most that a step allocates beside
weights, gradients included, both as `torch.profiler` records torch's allocator, and of each the largest of the ranks.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from as_they_come import QUICK, Results
from grouped_mm_cpu import processor
from recompute_memory import SIZES, kept_and_peak, make_model
from rich.console import Console
from rich.table import Table

RANKS = (1, 2, 4)
WAYS = ("none", "selective", "full")


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    tokens: Annotated[int, tyro.conf.arg(help="tokens of the sequence")] = 2048
    json: Annotated[Path | None, tyro.conf.arg(help="also write the results there")] = None


@dataclass(frozen=True)
class Result:
    """Bytes of the rank that has most."""

    cp: int
    recompute: str
    tokens: int
    kept: int
    peak: int


def run_rank(rank: int, folder: str, cp: int, options: Options) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["MOESAIC_CPU_POOL_MB"] = "0"  # torch's allocator does not know what is in the pool
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{cp}", rank=rank, world_size=cp)
    ids = torch.randint(SIZES["vocab_size"], (1, options.tokens), generator=torch.Generator().manual_seed(0))
    trace = Path(folder) / f"trace-{rank}.json"
    results = []
    for way in WAYS:
        model = make_model(way, {"cp": cp, "ep": cp})
        results.append(Result(cp, way, options.tokens, *kept_and_peak(model, ids, trace)))
    if rank == 0:
        Path(folder, f"result-{cp}.json").write_text(json.dumps([asdict(result) for result in results]))
    dist.barrier()
    dist.destroy_process_group()


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, tokens=256)
    about = {"processor": processor(), "sizes": SIZES}
    as_text = lambda row: "  ".join(map(str, row.values()))  # noqa: E731
    with Results(options.json, about, as_text, key="results") as results, tempfile.TemporaryDirectory() as folder:
        for cp in RANKS:
            mp.spawn(run_rank, (folder, cp, options), nprocs=cp)
            results.add(json.loads(Path(folder, f"result-{cp}.json").read_text()))
    table = Table(title=f"MB of a rank, one sequence of {options.tokens} tokens; in brackets: of cp 1 and none")
    for column in ("cp", "recompute", "kept after forward", "peak of a step"):
        table.add_column(column)
    first = results.rows[0]
    for row in results.rows:
        megabytes = [f"{row[k] / 1e6:.1f} ({row[k] / first[k]:.2f})" for k in ("kept", "peak")]
        table.add_row(str(row["cp"]), row["recompute"], *megabytes)
    Console().print(table)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
