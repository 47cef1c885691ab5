"""Loading a checkpoint onto ranks: bytes of the files read, and memory, of `load_pretrained` against the usual way.

    python benchmarks/loading.py [--quick] [--ranks 4] [--megabytes 400] [--json benchmarks/results/NAME.json]

The usual way is `from_pretrained`, `swap_moe`, `parallelize`. Memory is the highest of a rank over what it had before,
in two parts: its own (anonymous pages) and pages of files, which the system takes back when it needs them. Processor
time is that of all ranks together: loading against reading the same bytes into new memory, and `export_pretrained`
against a checkpoint of the same state.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from as_they_come import QUICK, Results
from grouped_mm_cpu import processor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic import checkpoint
from moesaic.integrations.transformers import export_pretrained, swap_moe
from moesaic.integrations.transformers.loading import Source, load_and_count

LAYERS, DIM, EXPERTS, HIDDEN, VOCAB = 4, 512, 32, 512, 8192


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    ranks: Annotated[Literal[1, 2, 4], tyro.conf.arg(help="processes over gloo")] = 4
    megabytes: Annotated[int, tyro.conf.arg(help="size of the model in fp32, roughly")] = 400
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


def write_model(folder: Path, megabytes: int) -> int:
    """A Qwen3-MoE of about that size in fp32; gives back its bytes."""
    of_experts = LAYERS * EXPERTS * 3 * DIM * HIDDEN * 4
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=DIM,
        moe_intermediate_size=HIDDEN * megabytes * 10**6 // of_experts // 8 * 8,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(p.nbytes for p in model.parameters())


def memory() -> dict[str, int]:
    """Resident bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


class Peak:
    """The most memory within a block, over what there was before it, sampled."""

    def __enter__(self) -> "Peak":
        self.before, self.over, self.done = memory(), {"RssAnon": 0, "RssFile": 0}, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            for name, value in memory().items():
                self.over[name] = max(self.over[name], value - self.before[name])

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


@contextmanager
def cpu(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Processor time of the block, of all threads."""
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def read_all(folder: Path) -> None:
    """The least that loading can cost: the bytes of the files, in new memory."""
    for file in folder.glob("*.safetensors"):
        buffer = torch.empty(file.stat().st_size, dtype=torch.uint8)
        with file.open("rb", buffering=0) as stream:
            view = memoryview(buffer.numpy())
            while len(view):
                view = view[stream.readinto(view) :]


def on_rank(rank: int, ranks: int, way: str, layout: dict[str, int], folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29513", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    # What the first model of a process costs beside its weights.
    tiny, _ = load_and_count(Source(f"{folder}/tiny"), meshes)
    export_pretrained(tiny, f"{folder}/out")
    checkpoint.save(Path(f"{folder}/checkpoints"), 0, tiny.state_dict(), {})
    del tiny
    dist.barrier()
    spent: dict[str, float] = {}
    num_bytes, start = 0, time.perf_counter()
    with Peak() as peak, cpu(spent, "load"):
        if way == "load_pretrained":
            model, num_bytes = load_and_count(Source(f"{folder}/model"), meshes)
        else:
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
            num_bytes = sum(p.nbytes for p in model.parameters())
            moesaic.parallelize(swap_moe(model), meshes)
    seconds = time.perf_counter() - start
    with Peak() as saving, cpu(spent, "export"):
        export_pretrained(model, f"{folder}/out")
    with cpu(spent, "checkpoint"):
        checkpoint.save(Path(f"{folder}/checkpoints"), 1, model.state_dict(), {})
    with cpu(spent, "read all"):
        read_all(Path(folder, "model"))
    weights = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    results.put((num_bytes, weights, peak.over, seconds, saving.over, spent))
    dist.barrier()
    dist.destroy_process_group()


LAYOUTS = {
    4: {
        "dp 4, ep 4": {"ep": 4},
        "dp 2, tp 2, ep 2, etp 2": {"tp": 2, "ep": 2, "etp": 2},
        "dp 1, tp 4, ep 4": {"tp": 4, "ep": 4},
    },
    2: {"dp 2, ep 2": {"ep": 2}, "tp 2, etp 2": {"tp": 2, "etp": 2}},
    1: {"one process": {}},
}


def measure(way: str, name: str, options: Options, folder: str, total: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    layout = LAYOUTS[options.ranks][name]
    arguments = [(rank, options.ranks, way, layout, folder, queue) for rank in range(options.ranks)]
    processes = [context.Process(target=on_rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    found = [queue.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(20)
    read, weights, peaks, seconds, saving, spent = zip(*found, strict=True)
    cpu_of = {kind: sum(of_rank[kind] for of_rank in spent) for kind in spent[0]}
    least = cpu_of["read all"] * sum(read) / (total * options.ranks)
    return {
        "layout": name,
        "way": way,
        "read": max(read),
        "read_of_all": sum(read),
        "memory": max(peak["RssAnon"] for peak in peaks),
        "memory_of_weights": max(peak["RssAnon"] / own for peak, own in zip(peaks, weights, strict=True)),
        "pages_of_files": max(peak["RssFile"] for peak in peaks),
        "seconds": max(seconds),
        "cpu": cpu_of,
        "cpu_of_reading": cpu_of["load"] / least,
        "memory_to_export": max(peak["RssAnon"] for peak in saving),
        "export_of_checkpoint": cpu_of["export"] / cpu_of["checkpoint"],
    }


COLUMNS = {
    "read": "read",
    "of all ranks": "read_of_all",
    "memory": "memory",
    "pages of files": "pages_of_files",
    "memory to export": "memory_to_export",
}


def as_text(row: dict[str, Any]) -> str:
    megabytes = " | ".join(f"{row[key] / 1e6:.0f}" for key in COLUMNS.values())
    ratios = " | ".join(f"{row[key]:.1f}" for key in ("memory_of_weights", "cpu_of_reading", "export_of_checkpoint"))
    return f"| {row['layout']} | {row['way']} | {megabytes} | {row['seconds']:.1f} | {ratios} |"


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, ranks=2, megabytes=100)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny", 20)
        total = write_model(Path(folder) / "model", options.megabytes)
        print(f"Qwen3-MoE, fp32, {total / 1e6:.0f} MB, {options.ranks} ranks; MB of the rank with most")
        print(
            "ratios: memory to the rank's weights, CPU to that of reading, CPU of an export to that of a checkpoint\n"
        )
        ratios = ["memory / weights", "CPU / reading", "export / checkpoint"]
        header = ["layout", "way", *COLUMNS, "seconds", *ratios]
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        about = {"what": "loading and exporting", "bytes": total, "ranks": options.ranks, "processor": processor()}
        with Results(options.json, about, as_text) as results:
            for name in LAYOUTS[options.ranks]:
                for way in ("load_pretrained", "from_pretrained"):
                    results.add(measure(way, name, options, folder, total))
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
