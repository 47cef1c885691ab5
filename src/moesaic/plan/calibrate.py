"""Measure this machine: products, memory, and under torchrun what ranks send to one another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from moesaic.ops import grouped_mm
from moesaic.plan.hardware import Hardware, Link

_ROUNDS = 5


def calibrated(base: Hardware) -> Hardware | None:
    """``base`` with what was measured here in its place; None on all ranks but the first.

    All ranks of a launcher measure at the same time, so that each has what is left to it by the others. Peaks of
    arithmetic and memory are then those that were reached, and their efficiencies 1. Without a launcher the links of
    ``base`` stay.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if launched:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group()
    try:
        flops = {"fp32": _matmul(torch.float32, device), "bf16": _matmul(torch.bfloat16, device)}
        many, few = _grouped(256, device), _grouped(8, device)
        # From rate(r) = top r / (r + half), at two r.
        half = max((many / few - 1) / (1 / 8 - many / few / 256), 0.01) if few < many else 0.01
        top = min(many * (1 + half / 256) / flops["fp32"], 1.0)
        measured = replace(
            base,
            flops=flops,
            efficiency=1.0,
            grouped_efficiency=top,
            half_rows=half,
            bandwidth=_memory(device),
            memory_efficiency=1.0,
        )
        if launched:
            link = _link(device)
            measured = replace(measured, node=link, network=link)
            return measured if dist.get_rank() == 0 else None
        return measured
    finally:
        if launched:
            dist.destroy_process_group()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, after one that does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _matmul(dtype: torch.dtype, device: torch.device) -> float:
    n = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def _grouped(rows: int, device: torch.device) -> float:
    experts, dim, hidden = (32, 2048, 1024) if device.type == "cuda" else (8, 512, 256)
    x = torch.randn(experts * rows, dim, device=device)
    w = torch.randn(experts, dim, hidden, device=device)
    sizes = torch.full((experts,), rows, device=device)
    return 2 * experts * rows * dim * hidden / _seconds(lambda: grouped_mm(x, w, sizes), device)


def _memory(device: torch.device) -> float:
    """Bytes read and written a second."""
    x = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _seconds(lambda: y.copy_(x), device)


def _link(device: torch.device) -> Link:
    """Of an all-to-all over all ranks, from a short and a long one."""
    ranks = dist.get_world_size()

    def exchange(numel: int) -> float:
        x = torch.zeros(ranks * numel, device=device)
        y = torch.empty_like(x)
        return _seconds(lambda: dist.all_to_all_single(y, x), device)

    short, long = 64, 2**20
    latency, seconds = exchange(short), exchange(long)
    sent = (long - short) * 4 * (ranks - 1)
    found = torch.tensor([sent / max(seconds - latency, 1e-9), latency], device=device, dtype=torch.float64)
    dist.all_reduce(found)
    bandwidth, latency = (found / ranks).tolist()
    return Link(bandwidth, latency)
