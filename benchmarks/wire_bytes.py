"""Bytes that a token's way to its experts and back puts on the wire: moesaic against transformers' `all_to_all`.

Both run for real on gloo ranks, with the same tokens, routing and weights, and equal results and gradients; what is
counted are the bytes that each collective hands to *other* ranks. Theirs: a copy of a token for each expert it goes to.
Ours: one for each rank that has some of them, and with it which experts those are, and their weights. The bound is that
copy alone, there and back, for each rank but the token's own; the backward pass has the same.

    python benchmarks/wire_bytes.py [--quick] [--dim 2048] [--tokens 256] [--json benchmarks/results/NAME.json]
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic
from moesaic.layers.router import Routing

EXPERTS, TOP_K, HIDDEN = 64, 8, 16  # the hidden dim of an expert never travels
RANKS = (2, 4)
DTYPES = (torch.float32, torch.bfloat16)
SENDS_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")
# Ours is counted twice: as `parallelize` uses it, and as transformers does with ep_implementation="moesaic".
OURS, UNDER_TRANSFORMERS, THEIRS = "parallelize", "moesaic", "all_to_all"


@dataclass(frozen=True)
class Options:
    """What to run."""

    quick: Annotated[bool, tyro.conf.arg(help="few and narrow tokens: does it run?")] = False
    dim: Annotated[int, tyro.conf.arg(help="model dim D")] = 2048
    tokens: Annotated[int, tyro.conf.arg(help="tokens of each rank")] = 256
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


class Sent(NamedTuple):
    """One pass of one rank: bytes of rows as wide as the model, and of all else (sizes, expert ids, weights)."""

    rows: int
    records: int


class CountSent(TorchDispatchMode):
    """Counts the bytes that this rank sends to other ranks.

    Attributes:
        rows, records: bytes to each rank, as in :class:`Sent`.

    Raises:
        NotImplementedError: a collective whose bytes it does not know.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.rows: Counter[int] = Counter()
        self.records: Counter[int] = Counter()

    def to(self, ranks: Collection[int]) -> Sent:
        """What went to some of the ranks."""
        return Sent(*(sum(sent[rank] for rank in ranks) for sent in (self.rows, self.records)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in SENDS_NOTHING:
            self._count(name, args)
        return func(*args, **kwargs or {})

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        ranks = range(dist.get_world_size())
        match name:
            case "alltoall_base_":  # transformers' own, over all ranks
                sent, splits = args[1], args[4]
            case "all_to_all_single":
                sent, splits, ranks = args[0], args[2], members(args[3])
            case "all_gather_into_tensor":
                for rank in members(args[2]):
                    self.records[rank] += args[0].nbytes * (rank != dist.get_rank())
                return
            case _:
                raise NotImplementedError(f"bytes of the collective '{name}'")
        splits = splits or [sent.shape[0] // len(ranks)] * len(ranks)
        width = prod(sent.shape[1:])
        counter = self.rows if width == self.dim else self.records
        for rank, count in zip(ranks, splits, strict=True):
            counter[rank] += count * width * sent.itemsize * (rank != dist.get_rank())


def members(name: str) -> list[int]:
    """The ranks of a process group that an operator was given by name."""
    return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))


@contextmanager
def counted(dim: int, found: list[Sent]) -> Iterator[None]:
    with CountSent(dim) as mode:
        yield
    found.append(mode.to(range(dist.get_world_size())))


class Problem(NamedTuple):
    """A layer and this rank's tokens; every rank draws the same layer."""

    moe: moesaic.MoE
    x: Tensor
    routing: Routing


def make_problem(dim: int, tokens: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    config = moesaic.MoEConfig(dim=dim, hidden_dim=HIDDEN, num_experts=EXPERTS, top_k=TOP_K)
    moe = moesaic.MoE(config, dtype=dtype)
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(tokens, dim, dtype=dtype)
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    return Problem(moe, x, Routing(ids, torch.rand(tokens, TOP_K).softmax(1)))


def lower_bound(owners: Tensor, x: Tensor) -> int:
    """Bytes of one pass, there and back: a copy of each token for each other rank that has one of its experts."""
    away = sum(int((owners == rank).any(1).sum()) for rank in range(dist.get_world_size()) if rank != dist.get_rank())
    return 2 * away * x.shape[1] * x.itemsize


def ours(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    ranks = dist.get_world_size()
    meshes = moesaic.build_meshes(tp=ranks, ep=ranks, device_type="cpu")
    moe = moesaic.parallelize(problem.moe, meshes)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        sent = moe.dispatcher.dispatch(x, Routing(problem.routing.ids, weights), EXPERTS)
        return moe.dispatcher.combine(moe.experts(sent.x, sent.topk_ids, sent.topk_weights, copies=sent.copies), sent)

    return run


def under_transformers(problem: Problem, implementation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Its expert parallelism around this rank's experts; every rank has its own tokens, as in data parallelism."""
    from transformers import Qwen3MoeConfig
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from moesaic.integrations.transformers import register

    ranks = dist.get_world_size()
    local = EXPERTS // ranks
    mine = slice(dist.get_rank() * local, (dist.get_rank() + 1) * local)
    dim = problem.x.shape[1]
    config = Qwen3MoeConfig(hidden_size=dim, moe_intermediate_size=HIDDEN, num_experts=local, num_experts_per_tok=1)
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).to(problem.x.dtype)
    w1, w3, w2 = (getattr(problem.moe.experts, name)[mine].mT for name in ("w1", "w3", "w2"))
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([w1, w3], 1))
        experts.down_proj.copy_(w2)
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    register()
    dispatch = EPImplementationInterface()[implementation](experts, mesh["ep"], mesh["tp"])
    return lambda x, weights: dispatch(x, problem.routing.ids, weights).to(x.dtype)


def count_rank(dim: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes that this rank sends: `{"bound": bytes, "copies": for experts elsewhere, name: [forward, backward]}`."""
    problem = make_problem(dim, tokens, dtype)
    owners = problem.routing.ids // (EXPERTS // dist.get_world_size())
    found: dict[str, Any] = {
        "bound": lower_bound(owners, problem.x),
        "copies": int((owners != dist.get_rank()).sum()),
    }
    results: dict[str, Tensor] = {}
    # `parallelize` last, for it takes the layer apart.
    for name in (THEIRS, UNDER_TRANSFORMERS, OURS):
        run = ours(problem) if name == OURS else under_transformers(problem, name)
        x = problem.x.clone().requires_grad_()
        weights = problem.routing.weights.clone().requires_grad_()
        passes: list[Sent] = []
        with counted(dim, passes):
            y = run(x, weights)
        with counted(dim, passes):
            y.float().square().sum().backward()
        found[name], results[name] = passes, y.detach().double()
        results[f"{name}, gradient"] = torch.cat([x.grad.double(), weights.grad.double()], 1)
    for name, what in product((OURS, UNDER_TRANSFORMERS), ("", ", gradient")):
        mine, other = results[name + what], results[THEIRS + what]
        error = ((mine - other).norm() / other.norm()).item()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"{name}{what} is not what theirs is: {error:.2g}"
    return found


def add_ranks(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over ranks."""
    total: dict[str, Any] = {name: sum(found[name] for found in by_rank) for name in ("bound", "copies")}
    for name in (OURS, UNDER_TRANSFORMERS, THEIRS):
        passes = zip(*(found[name] for found in by_rank), strict=True)
        total[name] = [Sent(*map(sum, zip(*one, strict=True))) for one in passes]
    return total


def _rank_main(rank: int, ranks: int, folder: str, options: Options) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {str(dtype): count_rank(options.dim, options.tokens, dtype) for dtype in DTYPES}
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Bytes a token, a row for each number of ranks, dtype and pass."""
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank_main, (ranks, folder, options), nprocs=ranks)
            by_rank = [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]
        for dtype in DTYPES:
            total = add_ranks([found[str(dtype)] for found in by_rank])
            tokens = ranks * options.tokens
            for i, what in enumerate(("forward", "backward")):
                mine, other = total[OURS][i], total[THEIRS][i]
                yield {
                    "ep": ranks,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": what,
                    "dim": options.dim,
                    "top_k": TOP_K,
                    "experts": EXPERTS,
                    "bound": total["bound"] / tokens,
                    "ours": {"rows": mine.rows / tokens, "records": mine.records / tokens},
                    "theirs": {"rows": other.rows / tokens, "records": other.records / tokens},
                    "of_bound": sum(mine) / total["bound"],
                    "ratio": sum(other) / sum(mine),
                }


def as_text(row: dict[str, Any]) -> str:
    return f"ep {row['ep']}, {row['dtype']}, {row['pass']}: theirs / ours {row['ratio']:.2f}x"


def show(rows: list[dict[str, Any]], options: Options) -> None:
    table = Table(title=f"bytes a token to other ranks: {EXPERTS} experts, top {TOP_K}, D {options.dim}")
    for column in ("ep", "dtype", "pass"):
        table.add_column(column)
    for column in ("bound", "rows", "records", "over the bound", "their rows", "their records", "theirs / ours"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row["bound"], row["ours"]["rows"], row["ours"]["records"]]
        table.add_row(
            str(row["ep"]),
            row["dtype"],
            row["pass"],
            *(f"{cell:,.0f}" for cell in cells),
            f"{100 * (row['of_bound'] - 1):.2f}%",
            *(f"{row['theirs'][part]:,.0f}" for part in ("rows", "records")),
            f"{row['ratio']:.2f}x",
        )
    Console(width=140).print(table)


def main(options: Options) -> None:
    from as_they_come import Results  # a neighbour of the script; others import this as a module

    if options.quick:
        options = replace(options, dim=256, tokens=64)
    with Results(options.json, {"what": "bytes on the wire", "tokens": options.tokens}, as_text) as results:
        for row in measure(options):
            results.add(row)
    show(results.rows, options)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
