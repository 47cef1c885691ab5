"""Times of steps as `moesaic plan` works them out, against steps on gloo ranks of this machine.

First the machine is measured as `moesaic plan --calibrate` does, by as many ranks as then train: they share its cores.
Then steps of all layouts take turns. What counts is the order: Kendall's tau among pairs of layouts whose measured
times differ by 20% or more.

    python benchmarks/plan_time.py [--quick] [--rounds 5] [--ranks 2 4] [--json benchmarks/results/NAME.json]
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from as_they_come import QUICK, Results, print_table
from grouped_mm_cpu import processor
from plan_steps import Case, hardware, seconds
from transformers import Qwen3MoeConfig

from moesaic.plan.choice import Job
from moesaic.plan.hardware import Hardware
from moesaic.plan.model import planned
from moesaic.plan.time import cost_of
from moesaic.testing import Ranks

JOB = Job(seq_len=256, batch=8)
DIFFERENT = 1.2

CASES = (
    Case(2, {}, 4),
    Case(2, {}, 1),
    Case(2, {"ep": 2}, 4),
    Case(2, {"ep": 2}, 1),
    Case(2, {"etp": 2}, 4),
    Case(2, {"tp": 2, "ep": 2}, 8),
    Case(2, {"tp": 2, "etp": 2}, 4),
    Case(2, {"cp": 2, "ep": 2}, 4),
    Case(2, {"pp": 2}, 2),
    Case(2, {"pp": 2}, 1),
    Case(2, {"ep": 2}, 4, "full"),
    Case(2, {}, 4, "experts"),
    Case(2, {"tp": 2, "etp": 2}, 1, "full"),
    Case(2, {"pp": 2}, 4, "full"),
    Case(4, {}, 2),
    Case(4, {}, 1),
    Case(4, {"ep": 4}, 2),
    Case(4, {"ep": 4}, 1, "full"),
    Case(4, {"etp": 4}, 2),
    Case(4, {"ep": 2, "etp": 2}, 2),
    Case(4, {"tp": 2, "ep": 4}, 4),
    Case(4, {"tp": 4, "etp": 4}, 2),
    Case(4, {"tp": 2, "ep": 2, "etp": 2}, 1, "full"),
    Case(4, {"dp_replicate": 2, "ep": 2}, 2),
    Case(4, {"pp": 2, "ep": 2}, 2),
    Case(4, {"pp": 2, "tp": 2, "ep": 2}, 2),
    Case(4, {"pp": 4}, 1),
    Case(4, {"ep": 2}, 2, "experts"),
)


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    rounds: Annotated[int, tyro.conf.arg(help="timed steps of each layout; the median counts")] = 5
    ranks: Annotated[tuple[int, ...], tyro.conf.arg(help="how many")] = (2, 4)
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


def model_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=2048,
    )


def kendall(pairs: Iterable[tuple[float, float]]) -> tuple[float, int]:
    """Of times measured and planned: how many pairs of them are in the same order less those that are not, as a part
    of all; and how many there are whose measured times differ.
    """
    different = [(a, b) for a, b in combinations(pairs, 2) if max(a[0], b[0]) >= DIFFERENT * min(a[0], b[0])]
    signs = [(a[0] < b[0]) - (a[0] > b[0]) for a, b in different]
    agree = [sign * ((a[1] < b[1]) - (a[1] > b[1])) for sign, (a, b) in zip(signs, different, strict=True)]
    return sum(agree) / max(1, len(agree)), len(agree)


def rows_of(ranks: Ranks, cases: list[Case], rounds: int, results: Results) -> None:
    config = model_config()
    shapes = planned(config, torch.float32, "model").shapes
    here: Hardware = ranks(hardware)[0]
    results.about.setdefault("hardware", {})[str(cases[0].ranks)] = asdict(here)
    measured = ranks(seconds, cases, config, JOB, rounds)[0]
    for case, taken in zip(cases, measured, strict=True):
        time = cost_of(shapes, case.choice, JOB, here, "fp32", case.ranks).time
        results.add(
            {
                "ranks": case.ranks,
                "layout": str(case),
                "measured": taken,
                "planned": time.total,
                "parts": time._asdict(),
            }
        )


def as_text(row: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in row["parts"].items() if value)
    return f"{row['layout']:62}{1e3 * row['measured']:7.0f} ms, planned {1e3 * row['planned']:5.0f} ({parts})"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    cases = CASES
    if options.quick:
        options, cases = replace(options, rounds=2), CASES[:14:3] + CASES[14::3]
    head = {"what": "seconds of a step, planned and measured", "processor": processor(), "torch": torch.__version__}
    with Results(options.json, head, as_text) as results:
        for count in options.ranks:
            with Ranks(count) as ranks:
                rows_of(ranks, [case for case in cases if case.ranks == count], options.rounds, results)
    found = {"all": results.rows} | {f"{n} ranks": [r for r in results.rows if r["ranks"] == n] for n in options.ranks}
    taus = {name: kendall((row["measured"], row["planned"]) for row in rows) for name, rows in found.items()}
    results.about["tau"] = {name: tau for name, (tau, _) in taus.items()}
    results.write()
    title = f"Kendall's tau, {processor()['model']}"
    cells = ([name, str(len(found[name])), str(pairs), f"{tau:.2f}"] for name, (tau, pairs) in taus.items())
    print_table(title, ("", "layouts", "pairs that differ", "tau"), cells)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
