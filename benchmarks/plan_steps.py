"""Steps of a small model in many layouts on the same gloo ranks, in turns: what `plan_time.py` measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import moesaic
from moesaic.integrations.transformers import swap_moe
from moesaic.optim import param_groups
from moesaic.parallel import Pipeline, no_sync, resolve_layout, split_into_stages
from moesaic.plan.calibrate import measured
from moesaic.plan.choice import Choice, Job, Recompute
from moesaic.plan.hardware import Hardware, read_hardware


class Case(NamedTuple):
    """A layout of a number of ranks, and how it trains."""

    ranks: int
    sizes: dict[str, int]
    sequences: int = 1
    recompute: Recompute = "none"

    @property
    def choice(self) -> Choice:
        return Choice(resolve_layout(self.ranks, **self.sizes), self.sequences, self.recompute)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items()) or "dp alone"
        again = "" if self.recompute == "none" else f", recompute {self.recompute}"
        return f"{self.ranks} ranks, {sizes}, {self.sequences} sequence{'s'[: self.sequences != 1]} a pass{again}"


def hardware() -> Hardware:
    """This rank's machine, measured by all ranks at once."""
    return measured(read_hardware("CPU"), torch.device("cpu"))


def seconds(cases: list[Case], config: Any, job: Job, rounds: int) -> list[float]:
    """The median time of a step of each case; they take turns, so that what disturbs the machine disturbs all."""
    steps = [_step(case, config, job) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds + 1):
        for step, taken in zip(steps, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


def _step(case: Case, config: Any, job: Job) -> Callable[[], None]:
    """A function that does one step, as the training program does it."""
    from transformers import AutoModelForCausalLM

    choice = case.choice
    layout, passes, targets_of_all = choice.layout, choice.passes(job), job.batch * job.seq_len
    meshes = moesaic.build_meshes(**case.sizes)
    torch.manual_seed(0)
    model: Any = swap_moe(AutoModelForCausalLM.from_config(config))
    if layout.pp > 1:
        model = split_into_stages(model, meshes)
    model = moesaic.parallelize(model, meshes, compute="local", recompute=case.recompute)
    optimizer = torch.optim.AdamW(param_groups(model, adamw=[model]), fused=True)
    torch.manual_seed(meshes.dp_rank)
    ids = torch.randint(config.vocab_size, (choice.sequences * passes, job.seq_len))
    targets = ids.roll(-1, 1)[:, meshes.sequence_positions(job.seq_len)]

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / targets_of_all

    pipeline = Pipeline(model, microbatches=passes) if layout.pp > 1 else None

    def step() -> None:
        if pipeline is not None:
            pipeline.step(ids, targets, loss)
        parts = (
            ()
            if pipeline is not None
            else zip(ids.split(choice.sequences), targets.split(choice.sequences), strict=True)
        )
        for number, (some, wanted) in enumerate(parts, start=1):
            with nullcontext() if number == passes else no_sync(model):
                loss(model(input_ids=some, use_cache=False).logits, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
