"""Memory of a rank as `moesaic plan` works it out, against torch's own accounting.

Torch's: `torch.distributed._tools` follows a whole step (the second) of the parallelized model, on fake tensors, in a
process group that sends nothing. Which buffers of FSDP are there at once was read off runs of 8 ranks with FSDP alone.

    python benchmarks/plan_memory.py [--quick] [--json benchmarks/results/plan_memory.json]
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.parallel import no_sync, resolve_layout
from moesaic.plan.choice import Choice, Job, Recompute
from moesaic.plan.memory import memory_of
from moesaic.plan.model import planned
from moesaic.plan.rehearsal import rehearse

CAPACITY = 256


class Case(NamedTuple):
    """A layout of a number of ranks, and how it trains."""

    ranks: int
    sizes: dict[str, int]
    sequences: int = 1
    recompute: Recompute = "none"
    vocab: int = 2048
    passes: int = 1
    autocast: bool = False


CASES = (
    Case(1, {}),
    Case(2, {"tp": 2, "ep": 2}),
    Case(4, {"tp": 4, "ep": 2, "etp": 2}),
    Case(4, {"tp": 4, "etp": 4}, recompute="experts"),
    Case(8, {}),
    Case(8, {}, recompute="full"),
    Case(8, {}, recompute="experts"),
    Case(8, {"ep": 2}, recompute="full"),
    Case(8, {"ep": 4}),
    Case(8, {"ep": 8}, sequences=2),
    Case(8, {"ep": 8}, recompute="full", vocab=16384),
    Case(8, {"tp": 2, "ep": 8}, recompute="full"),
    Case(8, {"dp_replicate": 2, "ep": 4}),
    Case(8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "ep": 2, "etp": 2}, recompute="full"),
    Case(16, {"tp": 2, "ep": 4, "etp": 2}, sequences=2),
    Case(16, {"tp": 4, "ep": 16}),
    Case(16, {"tp": 2, "ep": 4, "etp": 4}, recompute="experts", vocab=16384),
    Case(64, {"ep": 16}, sequences=2),
    Case(64, {"tp": 4, "ep": 16, "etp": 2}),
    Case(64, {"tp": 2, "ep": 8}, recompute="full", sequences=2),
    Case(6, {"ep": 3}),
    Case(256, {"tp": 4, "ep": 32, "etp": 2}, sequences=2),
    Case(8, {}, recompute="selective"),
    Case(8, {"ep": 8}, sequences=2, recompute="selective"),
    Case(8, {"tp": 2, "ep": 2, "etp": 2}, recompute="selective"),
    Case(4, {"tp": 4, "ep": 4}, recompute="selective"),
    Case(8, {"cp": 2, "ep": 4}),
    Case(16, {"cp": 4, "tp": 2, "ep": 8}, recompute="selective"),
    Case(8, {"ep": 4}, passes=2),
    Case(8, {"ep": 8}, sequences=2, autocast=True),
    Case(8, {"tp": 2, "ep": 4}, recompute="full", autocast=True),
)
QUICK = (CASES[2], CASES[7], CASES[9], CASES[27])


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help="four layouts: does it run?")] = False
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


def model_config(case: Case) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=32,
        num_experts_per_tok=4,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=case.vocab,
    )


def both(case: Case) -> tuple[int, int]:
    """Bytes that a rank of a case holds at most: as the planner works it out, and as torch counts."""
    layout = resolve_layout(case.ranks, **case.sizes)
    choice = Choice(layout, case.sequences, case.recompute)
    bounded = layout.ep * layout.etp > 1
    batch = case.passes * case.sequences * layout.dp_size
    job = Job(512, batch, case.autocast, CAPACITY if bounded else None)
    config = model_config(case)
    of_plan = planned(config, torch.float32, "model")
    memory = memory_of(of_plan.shapes, choice, job, rehearse(of_plan, choice, job))
    return memory.total, accounted(config, choice, job, torch.float32)


def accounted(config: Any, choice: Choice, job: Job, dtype: torch.dtype) -> int:
    """Bytes at the peak of the second step of a rank, as torch counts them."""
    from transformers import AutoModelForCausalLM

    # A neighbour of the script; tests import it as a part of the package of benchmarks.
    try:
        from fake_world import fake_world, laid_out
    except ImportError:
        from benchmarks.fake_world import fake_world, laid_out

    layout = choice.layout
    with fake_world(layout.world_size):
        sizes = {**layout.of_view("dense"), **layout.of_view("expert")}
        del sizes["edp"]
        meshes = moesaic.build_meshes(**sizes, device_type="cpu")
        with torch.device("meta"):
            model = swap_moe(AutoModelForCausalLM.from_config(config, dtype=dtype))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        options: Any = {"compute": "local", "capacity": job.capacity, "recompute": choice.recompute}
        model = laid_out(model, meshes, mode, **options)
        with mode:
            # As in training it is fused. On a DTensor torch would count tensors of the whole size, with which it works
            # out placements and which have no memory.
            whole = list(model.parameters())
            parts = [torch.nn.Parameter(_local(p.detach())) for p in whole]
            optimizer = torch.optim.AdamW(parts, fused=True)
            ids = torch.zeros(choice.sequences, job.seq_len, dtype=torch.int64)
            if isinstance(model, FSDPModule):
                tracker: Any = FSDPMemTracker(model, optimizer)
                tracker.track_inputs((ids,))
            else:
                tracker = MemTracker()
                tracker.track_external(model, optimizer)
            with tracker:
                for _ in range(2):
                    for number in reversed(range(choice.passes(job))):
                        with no_sync(model) if number else nullcontext(), torch.autocast("cpu", enabled=job.autocast):
                            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                            loss.backward()
                        tracker.reset_mod_stats()  # it knows one pass
                    for parameter, part in zip(whole, parts, strict=True):
                        assert parameter.grad is not None
                        part.grad, parameter.grad = _local(parameter.grad), None
                    optimizer.step()
                    optimizer.zero_grad()
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return peak["Total"]


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def measure(cases: tuple[Case, ...]) -> Iterator[dict[str, Any]]:
    for case in cases:
        of_plan, of_torch = both(case)
        yield {
            "ranks": case.ranks,
            "layout": ", ".join(f"{name} {size}" for name, size in case.sizes.items()),
            "sequences": case.sequences,
            "recompute": case.recompute,
            "vocab": case.vocab,
            "passes": case.passes,
            "autocast": case.autocast,
            "planned": of_plan,
            "counted": of_torch,
            "error": of_plan / of_torch - 1,
        }


def as_text(row: dict[str, Any]) -> str:
    return f"{row['ranks']} ranks, {row['layout']}, {said(row)}: {100 * row['error']:+.2f}%"


def said(row: dict[str, Any]) -> str:
    """What is not of the layout."""
    more = {"passes": row["passes"], "vocabulary": row["vocab"]}
    usual = {"passes": 1, "vocabulary": 2048}
    parts = [f"{name} {value}" for name, value in more.items() if value != usual[name]]
    return ", ".join([f"recompute {row['recompute']}", *parts, *["bf16"] * row["autocast"]])


def main(options: Options) -> None:
    from as_they_come import Results  # a neighbour of the script; others import this as a module

    with Results(options.json, {"what": "memory of a rank, planned and counted"}, as_text) as results:
        for row in measure(QUICK if options.quick else CASES):
            results.add(row)
    table = Table(title="memory of a rank, MiB")
    for column in ("ranks", "layout", "sequences", "otherwise", "planned", "counted by torch", "error"):
        table.add_column(column)
    for row in results.rows:
        sizes = (f"{row[name] / 2**20:.1f}" for name in ("planned", "counted"))
        table.add_row(
            str(row["ranks"]),
            row["layout"],
            str(row["sequences"]),
            said(row),
            *sizes,
            f"{100 * row['error']:+.2f}%",
        )
    Console(width=120).print(table)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
