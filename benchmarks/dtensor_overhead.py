"""What a DTensor costs: microseconds a call of an operator on plain tensors, on DTensors, and inside local_map.

The tensors are tiny, so that nearly all of a call is overhead. "first" is the first call of all, "cached" the same
again, "new rows" a call with another number of rows each time, as MoE layers make. "overhead" is cached less plain, and
the last column compares it with that of torch.matmul. Rank 0 of a simulated (2, 2) mesh whose weight is sharded by
columns, so that no call communicates. Times are of the processor, so other work on the machine counts little.

    python benchmarks/dtensor_overhead.py [--quick] [--calls 2000] [--json benchmarks/results/NAME.json]
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from as_they_come import QUICK, Results
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import local_map, register_sharding

import moesaic

R, K, N, E = 8, 8, 16, 2
ROUNDS = 20
REPLICATED = (Replicate(), Replicate())
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    quick: Annotated[bool, tyro.conf.arg(help=QUICK)] = False
    calls: Annotated[int, tyro.conf.arg(help="timed calls of each kind, in 20 rounds")] = 2000
    json: Annotated[Path | None, tyro.conf.arg(help="also write the numbers to this file")] = None


@dataclass(frozen=True)
class Case:
    """A function of rows and weight, on plain tensors and on DTensors."""

    name: str
    plain: Function
    sharded: Function
    weight: Tensor
    placements: tuple[Placement, ...]


def define(name: str) -> Any:
    """``x @ w`` as a custom operator."""
    op = torch.library.custom_op(
        f"overhead::{name}",
        lambda x, w, flag: x @ w,
        mutates_args=(),
        schema="(Tensor x, Tensor w, int flag) -> Tensor",
    )
    op.register_fake(lambda x, w, flag: x.new_empty(x.shape[0], w.shape[1]))

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        return op(grad, w.mT, 0), op(x.mT, grad, 0), None

    op.register_autograd(gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))
    return op


def cases(mesh: DeviceMesh) -> list[Case]:
    ours, torchs = define("ours"), define("torchs")
    moesaic.sharding_rule("m k, k n -> m n", linear=["x", "w"])(ours)

    @register_sharding(torchs._opoverload)
    def strategy(x: Any, w: Any, flag: int) -> Any:
        return [
            ([Replicate()], [Replicate(), Replicate(), None]),
            ([Shard(0)], [Shard(0), Replicate(), None]),
            ([Shard(1)], [Replicate(), Shard(1), None]),
            ([Partial()], [Shard(1), Shard(0), None]),
        ]

    sizes = torch.tensor([3, 5])
    sizes_d = DTensor.from_local(sizes, mesh, REPLICATED, run_check=False)
    w, columns = torch.randn(K, N), (Replicate(), Shard(1))
    experts, expert_columns = torch.randn(E, K, N), (Replicate(), Shard(2))

    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return moesaic.grouped_mm(x, w, sizes)

    inside: Any = local_map(
        grouped,
        out_placements=(columns,),
        in_placements=(REPLICATED, expert_columns),
        in_grad_placements=((Replicate(), Partial()), expert_columns),
        device_mesh=mesh,
    )

    def with_flag(op: Any) -> Function:
        return lambda x, w: op(x, w, 0)

    return [
        Case("torch.matmul", torch.matmul, torch.matmul, w, columns),
        Case("a custom matmul, register_sharding", with_flag(torchs), with_flag(torchs), w, columns),
        Case("a custom matmul, sharding_rule", with_flag(ours), with_flag(ours), w, columns),
        Case("grouped_mm", grouped, lambda x, w: moesaic.grouped_mm(x, w, sizes_d), experts, expert_columns),
        Case("grouped_mm in local_map", grouped, inside, experts, expert_columns),
    ]


def microseconds(calls: dict[str, Callable[[], object]], number: int) -> dict[str, float]:
    """Processor time of one call of each, the smallest of rounds in which they take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(number // ROUNDS):
                call()
            best[name] = min(best[name], (time.thread_time() - start) / (number // ROUNDS))
    return {name: seconds * 1e6 for name, seconds in best.items()}


def measure(case: Case, mesh: DeviceMesh, calls: int, *, backward: bool) -> dict[str, float]:
    """Microseconds a call, with gradients of rows and weight or without."""

    def runner(function: Function, *leaves: Tensor, grad: Tensor) -> Callable[[], object]:
        if not backward:
            return lambda: function(*leaves)
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    def placed(t: Tensor, placements: tuple[Placement, ...]) -> Tensor:
        return DTensor.from_local(t, mesh, placements, run_check=False).requires_grad_(backward)

    grad_placements = tuple(Shard(1) if isinstance(p, Shard) else p for p in case.placements)
    w = placed(case.weight.chunk(2, -1)[0].contiguous(), case.placements)
    x, grad = torch.randn(R, K), torch.ones(R, N)
    half = torch.ones(R, N // 2)
    sharded = runner(case.sharded, placed(x, REPLICATED), w, grad=placed(half, grad_placements).detach())
    start = time.thread_time()
    sharded()
    first = (time.thread_time() - start) * 1e6
    each = iter(
        [
            runner(
                case.sharded,
                placed(torch.randn(n, K), REPLICATED),
                w,
                grad=placed(torch.ones(n, N // 2), grad_placements).detach(),
            )
            for n in range(R + 1, R + 1 + calls // 10)
        ]
    )
    plain = runner(case.plain, x.requires_grad_(backward), case.weight.detach().requires_grad_(backward), grad=grad)
    plain()
    numbers = microseconds({"plain": plain, "cached": sharded}, calls)
    return numbers | {"first": first} | microseconds({"new rows": lambda: next(each)()}, calls // 10)


def main(options: Options) -> None:
    calls = options.calls // 10 if options.quick else options.calls
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "etp"))
    all_cases = cases(mesh)
    columns = ("plain", "first", "cached", "new rows", "overhead")
    table = Table(title=f"Microseconds a call, torch {torch.__version__}")
    for column in ("pass", "operator", *columns, "against torch.matmul"):
        table.add_column(column, justify="left" if column in ("pass", "operator") else "right")
    record = {
        "what": "cost of a DTensor call",
        "shapes": {"R": R, "K": K, "N": N, "E": E, "mesh": [2, 2]},
        "options": {"calls": calls},
        "processor": platform.machine(),
        "versions": {"torch": torch.__version__},
    }

    def cells(row: dict[str, Any]) -> list[str]:
        numbers = [f"{row['microseconds'][column]:,.1f}" for column in columns]
        return [row["pass"], row["operator"], *numbers, f"{row['ratio']:.2f}x"]

    with Results(options.json, record, lambda row: "  ".join(cells(row))) as results:
        for label, backward in (("forward", False), ("forward+backward", True)):
            reference = None
            for case in all_cases:
                numbers = measure(case, mesh, calls, backward=backward)
                numbers["overhead"] = numbers["cached"] - numbers["plain"]
                reference = reference or numbers["overhead"]
                ratio = numbers["overhead"] / reference
                results.add({"pass": label, "operator": case.name, "microseconds": numbers, "ratio": ratio})
    for row in results.rows:
        table.add_row(*cells(row))
    dist.destroy_process_group()
    Console(width=140).print(table)
    results.done()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
