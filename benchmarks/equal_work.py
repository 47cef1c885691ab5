"""What one rank of expert parallelism keeps and how long it takes, for the same number of copies on however many ranks.

With more ranks, each has fewer experts, and more tokens send a copy to one of them: a rank computes as many copies as
before, but of more tokens. What it keeps is the rows that arrive, once each, and two pre-activations for each copy.
Nothing is sent here: the first rank's rows are made at once, and its experts are called as the dispatcher calls them.

    python benchmarks/equal_work.py [--quick] [--threads 1] [--rounds 15] [--json benchmarks/results/NAME.json]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from as_they_come import QUICK, Results
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moesaic
from moesaic.parallel.traffic import round_up_capacity

EXPERTS, TOP_K = 128, 8
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    tokens: Annotated[int, tyro.conf.arg(help="tokens of each rank")] = 522
    dim: Annotated[int, tyro.conf.arg(help="model dim D")] = 256
    hidden: Annotated[int, tyro.conf.arg(help="hidden dim F")] = 128
    impls: Annotated[tuple[str, ...], tyro.conf.arg(help="implementations of experts_mlp")] = ("cpu", "torch")
    threads: Annotated[int, tyro.conf.arg(help="threads")] = 1
    rounds: Annotated[int, tyro.conf.arg(help="how often each is timed, in turns; the median counts")] = 15
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


class Work(NamedTuple):
    """One rank's part: forward and backward, the bytes kept between the two, and their least."""

    run: Callable[[], None]
    copies: int
    rows: int
    kept: int
    least: int


def work_of(ep: int, impl: str, options: Options) -> Work:
    """The first of ``ep`` ranks."""
    torch.manual_seed(0)
    own = EXPERTS // ep
    ids = torch.rand(options.tokens * ep, EXPERTS).topk(TOP_K).indices.to(torch.int32)
    ids = torch.where(ids < own, ids, -1)
    ids = ids[(ids >= 0).any(1)]
    slots = (ids >= 0).flatten().nonzero().squeeze(1)
    room = round_up_capacity(len(slots)) - len(slots)
    copies = None if ep == 1 else torch.nn.functional.pad(slots, (0, room), value=-1)
    D, F, rows = options.dim, options.hidden, len(ids)
    x, routing_weights = torch.randn(rows, D, requires_grad=True), torch.rand(rows, TOP_K, requires_grad=True)
    weights = [torch.randn(own, *shape).mul_(0.06).requires_grad_() for shape in ((D, F), (D, F), (F, D))]
    grad = torch.randn(rows, D)

    def forward() -> Tensor:
        return moesaic.experts_mlp(x, ids, routing_weights, *weights, copies=copies, impl=impl)

    def run() -> None:
        torch.autograd.grad(forward(), (x, routing_weights, *weights), grad)

    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if all(t.data_ptr() != w.data_ptr() for w in weights):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return Work(run, len(slots), rows, sum(kept.values()), (rows * D + 2 * len(slots) * F) * x.element_size())


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A row for each implementation and number of ranks."""
    for impl in options.impls:
        works = {ep: work_of(ep, impl, options) for ep in RANKS}
        times: dict[int, list[float]] = {ep: [] for ep in RANKS}
        for _ in range(options.rounds + 1):
            for ep, work in works.items():
                start = time.perf_counter()
                work.run()
                times[ep].append(time.perf_counter() - start)
        medians = {ep: statistics.median(of_one[1:]) for ep, of_one in times.items()}
        for ep, work in works.items():
            yield {
                "impl": impl,
                "ep": ep,
                "copies": work.copies,
                "rows": work.rows,
                "kept_bytes": work.kept,
                "of_least": work.kept / work.least,
                "ms": medians[ep] * 1e3,
                "of_one_rank": medians[ep] / medians[1],
            }


def as_text(row: dict[str, Any]) -> str:
    return f"{row['impl']}, ep {row['ep']}: {row['kept_bytes'] / 1e6:.1f} MB, {row['ms']:.1f} ms"


def show(rows: list[dict[str, Any]], options: Options) -> None:
    title = f"{EXPERTS} experts, top {TOP_K}, D {options.dim}, F {options.hidden}, fp32, {options.threads} thread(s)"
    table = Table(title=title)
    for column in ("impl", "ep", "copies", "rows", "kept, MB", "of the least", "ms", "of one rank"):
        table.add_column(column, justify="left" if column == "impl" else "right")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("impl", "ep", "copies", "rows")),
            f"{row['kept_bytes'] / 1e6:.1f}",
            f"{row['of_least']:.2f}",
            f"{row['ms']:.1f}",
            f"{row['of_one_rank']:.2f}x",
        )
    Console(width=120).print(table)


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, tokens=32, rounds=1, impls=("torch",))
    torch.set_num_threads(options.threads)
    head = {"what": "equal work", "tokens": options.tokens, "threads": options.threads, "torch": torch.__version__}
    with Results(options.json, head, as_text) as results:
        for row in measure(options):
            results.add(row)
    show(results.rows, options)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
