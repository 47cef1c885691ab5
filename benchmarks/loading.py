"""Loading a checkpoint onto ranks: bytes of the files read, and memory, of `load_pretrained` against the usual way.

    python benchmarks/loading.py [--ranks 4] [--megabytes 400]

The usual way is `from_pretrained`, `swap_moe`, `parallelize`. Memory is the highest of a rank over what it had before,
in two parts: its own (anonymous pages) and pages of files, which the system takes back when it needs them.
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import export_pretrained, swap_moe
from moesaic.integrations.transformers.loading import Source, load_and_count

LAYERS, DIM, EXPERTS, HIDDEN, VOCAB = 4, 512, 32, 512, 8192


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


def on_rank(rank: int, ranks: int, way: str, layout: dict[str, int], folder: str, results: object) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29513", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    # What the first model of a process costs beside its weights.
    load_and_count(Source(f"{folder}/tiny"), meshes)
    dist.barrier()
    num_bytes, start = 0, time.perf_counter()
    with Peak() as peak:
        if way == "load_pretrained":
            model, num_bytes = load_and_count(Source(f"{folder}/model"), meshes)
        else:
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
            num_bytes = sum(p.nbytes for p in model.parameters())
            moesaic.parallelize(swap_moe(model), meshes)
    seconds = time.perf_counter() - start
    with Peak() as saving:
        export_pretrained(model, f"{folder}/out")
    results.put((num_bytes, peak.over, seconds, saving.over))  # type: ignore[attr-defined]
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=400)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    layouts = {
        "dp 4, ep 4": {"ep": 4},
        "dp 2, tp 2, ep 2, etp 2": {"tp": 2, "ep": 2, "etp": 2},
        "dp 1, tp 4, ep 4": {"tp": 4, "ep": 4},
    }
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny", 20)
        total = write_model(Path(folder) / "model", options.megabytes)
        print(f"Qwen3-MoE, fp32, {total / 1e6:.0f} MB, {options.ranks} ranks; MB of the rank with most\n")
        print("| layout | way | read | of all ranks | memory | pages of files | seconds | memory to export |")
        print("|---|---|---|---|---|---|---|---|")
        for name, layout in layouts.items():
            for way in ("load_pretrained", "from_pretrained"):
                queue = context.Queue()
                arguments = [(rank, options.ranks, way, layout, folder, queue) for rank in range(options.ranks)]
                processes = [context.Process(target=on_rank, args=each) for each in arguments]
                for process in processes:
                    process.start()
                rows = [queue.get(timeout=200) for _ in processes]
                for process in processes:
                    process.join(20)
                read, peaks, seconds, saving = zip(*rows, strict=True)
                anon, file = (max(peak[kind] for peak in peaks) for kind in ("RssAnon", "RssFile"))
                export = max(peak["RssAnon"] for peak in saving)
                print(
                    f"| {name} | {way} | {max(read) / 1e6:.0f} | {sum(read) / 1e6:.0f} | {anon / 1e6:.0f} "
                    f"| {file / 1e6:.0f} | {max(seconds):.1f} | {export / 1e6:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
