"""Where the time of both passes goes, and other configurations of the kernel that loses most of it."""

import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.gpu import common, warm
from benchmarks.gpu.common import DRY_RUN
from benchmarks.gpu.launches import Sizes
from benchmarks.gpu.layer import OURS, Case, contenders
from benchmarks.gpu.shapes import Shape

from moesaic.ops.triton import tuner
from moesaic.ops.triton.configs import Launch, default_of, using
from moesaic.ops.triton.maps import Groups

Row = dict[str, Any]
# Products of R x D x F in both passes, by the name of a kernel's configuration.
_PRODUCTS = {"up_projection": 2, "matmul": 3, "down_gradient": 1, "weight_grad": 3}
_KERNELS = {"grouped_mm_kernel": "matmul"}


def rows(shape: Shape, tokens: int, routing: str, ceilings: Row, seconds: float) -> Iterator[Row]:
    """A row for each kernel, then one for each configuration of the one that is furthest from the peak."""
    start = time.monotonic()
    contender = contenders(shape)[1][OURS]
    case = Case.of(shape, tokens, routing)
    both = functools.partial(case.both, contender)
    named = {"shape": shape.name, "T": tokens, "routing": routing}
    lost: dict[str, float] = {}
    for kernel, ms in _profile(both).items():
        row: Row = {"what": "profile", **named, "kernel": kernel, "ms": ms}
        if kernel in _PRODUCTS:
            flops = 2 * tokens * shape.K * shape.D * shape.F * _PRODUCTS[kernel]
            row["TFLOP/s"] = flops / ms / 1e9
            lost[kernel] = row["ms lost"] = ms - flops / ceilings["matmul TFLOP/s"] / 1e9
        yield row
    worst = max(lost, key=lambda name: lost[name])
    groups = Groups(case.ids.new_empty(1, shape.E + 2), shape.E, False, tokens * shape.K)
    default = default_of(Launch(worst, case.x, shape.D, shape.F, groups, {}, gathers=worst == "weight_grad"))
    others = [config for config in tuner.neighbours(default) if config != default][: 2 if DRY_RUN else None]
    if not DRY_RUN:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        sizes = Sizes(tokens, shape.K, shape.E, shape.D, shape.F)
        parts = ("forward", "backward") if worst in ("matmul", "up_projection") else ("backward",)
        pieces = [warm.Piece(capability, sizes, part, worst, config) for config in others for part in parts]
        yield {"what": "warm", **named, **warm.compile_all(pieces, os.cpu_count() or 1, seconds / 3)}
    expected = case.results(contender)["z"]
    for config in (default, *others):
        if time.monotonic() - start > seconds:
            return
        row: Row = {"what": "sweep", **named, "kernel": worst, "config": str(config)}
        with using(worst, config):
            try:
                row["apart"] = common.error(case.results(contender)["z"], expected)
                row["fwd+bwd ms"] = common.milliseconds(both)
            except Exception as failure:
                if not DRY_RUN:
                    torch.cuda.synchronize()  # raises where the GPU itself has failed
                row["failed"] = f"{type(failure).__name__}: {failure}"[:200]
        yield row


def _profile(run: Any) -> dict[str, float]:
    """Milliseconds by kernel, the longest first; those of torch together. Without a GPU, made up."""
    if DRY_RUN:
        return {kernel: float(n) for n, kernel in enumerate(_PRODUCTS, 1)}
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key.strip("_")
        name = _KERNELS.get(name, name.removesuffix("_kernel")) if name.endswith("_kernel") else "torch's"
        found[name] = found.get(name, 0.0) + event.self_device_time_total / 1e3
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))
