"""Measure this machine: products, memory, what a layer costs the host, and under torchrun what ranks send.

All ranks do the same at the same time, again and again, and the time of a call is that of all calls by their number. So
a rank has what the others leave to it, as in training: ranks may be more than cores, and a median of short calls would
not see it.

Legend: E experts, R rows, D model dim, F hidden dim.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from moesaic.layers import MoE, MoEConfig
from moesaic.ops import experts_mlp
from moesaic.parallel import build_meshes, parallelize
from moesaic.plan.hardware import SAME_AS_DIRECT, Hardware, Link

# Of a layer over ep: rows and weights there, results back, and the same in the backward pass. And counts.
_CALLS_OF_LAYER = 7
_FUNCTIONAL = torch.ops._c10d_functional


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        seconds: how long a call is repeated, and at least twice.
        square: side of the matrices of a dense product.
        experts: ``E, D, F``.
        rows: of an expert: few and many.
        memory: elements that are copied.
        sent: elements to each other rank, in a long exchange.
    """

    seconds: float
    square: int
    experts: tuple[int, int, int]
    rows: tuple[int, int]
    memory: int
    sent: int


OF_CPU = Sizes(0.3, 512, (8, 256, 256), (16, 256), 2**22, 2**20)
OF_GPU = Sizes(0.2, 8192, (32, 2048, 1024), (16, 1024), 2**28, 2**24)


def calibrated(base: Hardware) -> Hardware | None:
    """``base`` with what was measured here in its place; None on all ranks but the first.

    Under a launcher all ranks measure at the same time, and the link between them, too: that within a node, or where
    the launcher says that ranks are on several, that between nodes. Other links are those of ``base``, and so is the
    memory of a CPU.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if launched:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group()
    try:
        found = measured(base, device)
        return found if not launched or dist.get_rank() == 0 else None
    finally:
        if launched:
            dist.destroy_process_group()


def measured(base: Hardware, device: torch.device, sizes: Sizes | None = None) -> Hardware:
    """As :func:`calibrated`, of the ranks of the process group that there is, or of one process. Collective.

    Rates are those that were reached, and their efficiencies 1.
    """
    sizes = sizes or (OF_GPU if device.type == "cuda" else OF_CPU)
    clock = _Clock(device, sizes.seconds)
    product = _product(torch.float32, device, sizes.square)
    work = 2 * sizes.square**3
    together = clock(product)
    flops = {"fp32": work / together, "bf16": work / clock(_product(torch.bfloat16, device, sizes.square))}
    few, many = (_experts_rate(rows, device, sizes, clock) for rows in sizes.rows)
    # From rate(r) = top r / (r + half), at two r.
    a, b = sizes.rows
    half = max((many / few - 1) / (1 / a - many / few / b), 0.01) if many / few < b / a else float(b)
    of_dtype = flops["bf16" if device.type == "cuda" else "fp32"]
    x = torch.randn(sizes.memory, device=device)
    alone = clock(_passes(_small(4, device), device))
    found = replace(
        base,
        flops=flops,
        efficiency=1.0,
        grouped_efficiency=many * (1 + half / b) / of_dtype,
        half_rows=half,
        # What is made anew, as the results of operators are.
        bandwidth=2 * x.nbytes / clock(x.clone),
        memory_efficiency=1.0,
        memory=base.memory if device.type == "cpu" else float(torch.cuda.get_device_properties(device).total_memory),
        # A third of both passes, and attention is about as many operators again.
        layer=2 * alone / 3,
    )
    return _of_ranks(found, device, sizes, clock, product, together, alone) if dist.is_initialized() else found


class _Clock:
    """Seconds of a call, by all ranks at once."""

    def __init__(self, device: torch.device, least: float) -> None:
        self.device, self.least = device, least

    def __call__(self, call: Callable[[], object], *, first_only: bool = False) -> float:
        """``first_only``: the other ranks wait meanwhile."""
        waits = first_only and dist.is_initialized() and dist.get_rank() > 0
        self._together()
        call()  # what happens once
        start = self._now()
        call()
        # All ranks do the same, also where the call is a collective.
        often = self._of_first(max(2, int(self.least / max(self._now() - start, 1e-6))))
        self._together()
        start = self._now()
        for _ in range(0 if waits else often):
            call()
        alone = self._now() - start
        self._together()
        return self._mean((alone if first_only else self._now() - start) / often, first_only)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _together(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def _of_first(self, number: int) -> int:
        if not dist.is_initialized():
            return number
        found = torch.tensor(number, device=self.device)
        dist.broadcast(found, 0)
        return int(found)

    def _mean(self, seconds: float, first_only: bool) -> float:
        if not dist.is_initialized():
            return seconds
        found = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        if first_only:
            dist.broadcast(found, 0)
            return found.item()
        dist.all_reduce(found)
        return found.item() / dist.get_world_size()


def _product(dtype: torch.dtype, device: torch.device, n: int) -> Callable[[], object]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _experts_rate(rows: int, device: torch.device, sizes: Sizes, clock: _Clock) -> float:
    """Operations a second of experts with so many rows each, forward and backward."""
    E, D, F = sizes.experts
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).mul_(shape[-1] ** -0.5).to(dtype).requires_grad_()

    x, w1, w3, w2 = normal(E * rows, D), normal(E, D, F), normal(E, D, F), normal(E, F, D)
    ids = (torch.arange(E * rows, device=device) % E)[:, None]
    weights = torch.ones(E * rows, 1, device=device)

    def call() -> object:
        y = experts_mlp(x, ids, weights, w1, w3, w2)
        return torch.autograd.grad(y, (x, w1, w3, w2), y)

    return 3 * 6 * E * rows * D * F / clock(call)


def _passes(model: nn.Module, device: torch.device) -> Callable[[], object]:
    """Both passes of a layer with next to no tokens."""
    x = torch.randn(4, 16, device=device, requires_grad=True)
    return lambda: model(x).sum().backward()


def _small(experts: int, device: torch.device) -> MoE:
    return MoE(MoEConfig(dim=16, hidden_dim=16, num_experts=experts, top_k=min(2, experts))).to(device)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _of_ranks(
    found: Hardware,
    device: torch.device,
    sizes: Sizes,
    clock: _Clock,
    product: Callable[[], object],
    together: float,
    of_layer: float,
) -> Hardware:
    """What is known of several ranks only: links, and what they take from one another.

    ``together``, ``of_layer``: seconds of the product, and of both passes of a small layer on one rank.
    """
    ranks = dist.get_world_size()

    group = _world().group_name

    def exchange(numel: int) -> Callable[[], object]:
        x = torch.zeros(ranks * numel, device=device)
        return lambda: dist.all_to_all_single(torch.empty_like(x), x)

    short, long = exchange(64), exchange(sizes.sent)
    latency = clock(short)
    seconds = clock(long)
    # Where collectives follow one another there is no work between them, on the host nor on ranks that come late. In a
    # layer there is.
    spread = parallelize(_small(2 * ranks, device), build_meshes(ep=ranks, device_type=device.type), compute="local")
    in_layer = (clock(_passes(spread, device)) - of_layer) / _CALLS_OF_LAYER
    link = Link((sizes.sent - 64) * 4 * (ranks - 1) / max(seconds - latency, 1e-9), max(in_layer, latency))
    x, part = torch.zeros(ranks * sizes.sent, device=device), torch.zeros(sizes.sent, device=device)
    # Each of these sends as many bytes as the exchange. An all-reduce sends what it has twice around.
    whole = torch.zeros(ranks * sizes.sent // 2, device=device)
    calls: dict[str, Callable[[], object]] = {
        "all-gather": lambda: _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_gather_into_tensor(part, ranks, group)),
        "reduce-scatter": lambda: _FUNCTIONAL.wait_tensor(_FUNCTIONAL.reduce_scatter_tensor(x, "sum", ranks, group)),
        "all-reduce": lambda: dist.all_reduce(whole),
    }
    slower = {kind: max(clock(call) - latency, 1e-9) / max(seconds - latency, 1e-9) for kind, call in calls.items()}

    def beside() -> None:
        under_way = dist.all_to_all_single(torch.empty_like(x), x, async_op=True)
        for _ in range(often):
            product()
        assert under_way is not None
        under_way.wait()

    # About as long as the exchange.
    often = max(1, round(seconds / together))  # the same on all ranks, as its parts are
    both, parts = clock(beside), (seconds, often * together)
    overlap = min(max((sum(parts) - both) / min(parts), 0.0), 1.0)
    alone = min(max(together / clock(product, first_only=True), 1.0), float(ranks))
    near = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks))) == ranks
    node, network = (link, found.network) if near else (found.node, link)
    return replace(found, node=node, network=network, slower=SAME_AS_DIRECT | slower, overlap=overlap, alone=alone)
