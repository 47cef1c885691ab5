"""Bytes between nodes on a token's way to its experts and back: straight to each rank, and over nodes first.

Eight gloo ranks stand for 2 nodes of 4 and for 4 nodes of 2, all of them in one ep group. Both exchanges run for real,
with the same tokens and routing and equal results and gradients. What is counted are the bytes that each collective
hands to ranks of *other* nodes, and to others of the same node. The bound is a copy of each token for each other node
that has some of its experts, there and back; the backward pass has the same.

The time is that of dispatch and combine alone, forward and backward. Here all ranks are on one machine, where crossing
is not slower: it says what a second hop costs and not what it saves.

    python benchmarks/node_bytes.py [--quick] [--dim 2048] [--tokens 256] [--json benchmarks/results/NAME.json]
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moesaic
from moesaic.layers.router import Routing
from moesaic.parallel.dispatch import MeshDispatcher
from moesaic.parallel.nodes import expected_rows

RANKS, EXPERTS = 8, 64
PER_NODE = (4, 2)
TOP_K = (8, 2)
ONE_HOP, TWO_HOPS = "one hop", "two hops"


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help="few and narrow tokens, and few rounds: does it run?")] = False
    dim: Annotated[int, tyro.conf.arg(help="model dim D")] = 2048
    tokens: Annotated[int, tyro.conf.arg(help="tokens of each rank")] = 256
    rounds: Annotated[int, tyro.conf.arg(help="how often each is timed, in turns; the median counts")] = 15
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


class Case(NamedTuple):
    """One layout and routing."""

    per_node: int
    top_k: int
    dim: int
    tokens: int
    rounds: int


def bound(owners_TK: Tensor, case: Case) -> int:
    """Bytes of one pass, there and back: a copy of each token for each other node that has one of its experts."""
    nodes_TK = owners_TK // case.per_node
    others = [node for node in range(RANKS // case.per_node) if node != dist.get_rank() // case.per_node]
    return 2 * sum(int((nodes_TK == node).any(1).sum()) for node in others) * case.dim * torch.bfloat16.itemsize


def count_rank(case: Case, counting: Callable[[int], Any]) -> dict[str, Any]:
    """What this rank sends: `{"bound": bytes, exchange: {"across": [[rows, records] of each pass], "within": ...}}`.

    `counting` is `CountSent` of `wire_bytes.py`.
    """
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(case.tokens, case.dim, dtype=torch.bfloat16)
    ids = torch.rand(case.tokens, EXPERTS).topk(case.top_k).indices
    weights = torch.rand(case.tokens, case.top_k).softmax(1)
    meshes = moesaic.build_meshes(ep=RANKS, device_type="cpu", ranks_per_node=case.per_node)
    me, node = dist.get_rank(), dist.get_rank() // case.per_node
    within = {rank for rank in range(RANKS) if rank // case.per_node == node} - {me}
    places = {"across": set(range(RANKS)) - within - {me}, "within": within}
    groups = {ONE_HOP: None, TWO_HOPS: meshes.nodes.groups}
    found: dict[str, Any] = {"bound": bound(ids // (EXPERTS // RANKS), case)}
    results: dict[str, list[Tensor]] = {}
    timed: dict[str, Callable[[], None]] = {}
    for name, nodes in groups.items():
        dispatcher = MeshDispatcher(meshes.expert["ep", "etp"], local=True, nodes=nodes)
        x_, weights_ = x.clone().requires_grad_(), weights.clone().requires_grad_()
        with counting(case.dim) as forward:
            y = there_and_back(dispatcher, x_, Routing(ids, weights_))
        with counting(case.dim) as backward:
            y.float().square().sum().backward()
        results[name] = [t.detach().double() for t in (y, x_.grad, weights_.grad)]
        passes = (forward, backward)
        found[name] = {place: [list(one.to(ranks)) for one in passes] for place, ranks in places.items()}
        timed[name] = lambda d=dispatcher, x=x_, w=weights_: there_and_back(d, x, Routing(ids, w)).sum().backward()
    for one, two in zip(results[ONE_HOP], results[TWO_HOPS], strict=True):
        assert (one - two).norm() <= 2e-2 * one.norm(), "the exchanges differ"
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(case.rounds):
        for name, run in timed.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        found[name]["seconds"] = statistics.median(times) if times else None
    return found


def there_and_back(dispatcher: MeshDispatcher, x: Tensor, routing: Routing) -> Tensor:
    """Experts that multiply a token by the sum of its weights."""
    sent = dispatcher.dispatch(x, routing, EXPERTS)
    factors = torch.where(sent.topk_ids < 0, 0, sent.topk_weights).sum(-1, keepdim=True)
    return dispatcher.combine(sent.x * factors.to(x.dtype), sent)


def add_ranks(by_rank: Sequence[dict[str, Any]], case: Case) -> Iterator[dict[str, Any]]:
    """Sums over ranks, a row for each exchange and pass; bytes a token."""
    tokens, total = RANKS * case.tokens, sum(found["bound"] for found in by_rank)
    nodes = RANKS // case.per_node
    expected = dict(zip((ONE_HOP, TWO_HOPS), expected_rows(nodes, case.per_node, EXPERTS, case.top_k), strict=True))
    for i, what in enumerate(("forward", "backward")):
        for name in (ONE_HOP, TWO_HOPS):
            sent = {
                place: [sum(found[name][place][i][part] for found in by_rank) / tokens for part in (0, 1)]
                for place in ("across", "within")
            }
            times = [found[name]["seconds"] for found in by_rank]
            yield {
                "nodes": nodes,
                "per_node": case.per_node,
                "top_k": case.top_k,
                "exchange": name,
                "pass": what,
                "dim": case.dim,
                "experts": EXPERTS,
                "dtype": "bfloat16",
                "bound": total / tokens,
                "expected_rows": expected[name],
                "across": dict(zip(("rows", "records"), sent["across"], strict=True)),
                "within": dict(zip(("rows", "records"), sent["within"], strict=True)),
                "of_bound": sum(sent["across"]) * tokens / total,
                "seconds_of_both_passes": max(times) if None not in times else None,
            }


def _rank_main(rank: int, folder: str, cases: list[Case], counting: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save([count_rank(case, counting) for case in cases], Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: Options) -> Iterator[list[dict[str, Any]]]:
    """Rows of one case after the other. The ranks are started once, which takes longer than a case."""
    from wire_bytes import CountSent  # a neighbour of the script

    sizes = options.dim, options.tokens, options.rounds
    cases = [Case(per_node, top_k, *sizes) for per_node in PER_NODE for top_k in TOP_K]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (folder, cases, CountSent), nprocs=RANKS)
        by_rank = [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(RANKS)]
    for case, found in zip(cases, zip(*by_rank, strict=True), strict=True):
        yield list(add_ranks(found, case))


def as_text(row: dict[str, Any]) -> str:
    where = f"{row['nodes']} nodes of {row['per_node']}, top {row['top_k']}, {row['pass']}, {row['exchange']}"
    return f"{where}: {100 * (row['of_bound'] - 1):.2f}% over the bound of distinct nodes"


def show(rows: list[dict[str, Any]], options: Options) -> None:
    table = Table(title=f"bytes a token: {EXPERTS} experts on {RANKS} ranks, D {options.dim}, bf16")
    for column in ("nodes", "top-k", "pass", "exchange"):
        table.add_column(column)
    for column in ("bound", "across: rows", "records", "over the bound", "within: rows", "records", "both passes"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = row["seconds_of_both_passes"]
        table.add_row(
            f"{row['nodes']} of {row['per_node']}",
            str(row["top_k"]),
            row["pass"],
            row["exchange"],
            *(f"{n:,.0f}" for n in (row["bound"], row["across"]["rows"], row["across"]["records"])),
            f"{100 * (row['of_bound'] - 1):.2f}%",
            *(f"{n:,.0f}" for n in row["within"].values()),
            "" if seconds is None else f"{1e3 * seconds:.1f} ms",
        )
    Console(width=150).print(table)


def main(options: Options) -> None:
    from as_they_come import Results  # neighbours of the script; others import this as a module
    from grouped_mm_cpu import processor

    if options.quick:
        options = replace(options, dim=256, tokens=64, rounds=3)
    about = {"what": "bytes between nodes", "tokens": options.tokens, "rounds": options.rounds}
    about |= {"processor": processor(), "torch": torch.__version__}
    with Results(options.json, about, as_text) as results:
        for rows in measure(options):
            results.add(rows)
    show(results.rows, options)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
