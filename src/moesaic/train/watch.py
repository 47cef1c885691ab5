"""What is measured of a step that is logged: load, entropy, bytes, memory, speed.

Other steps measure nothing. All numbers of ranks come together in two small reductions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic import ranks
from moesaic.layers import TopKRouter
from moesaic.layers.load import routers
from moesaic.layers.recompute import count_once
from moesaic.layers.router import Routing
from moesaic.parallel.capacity import most_copies
from moesaic.parallel.collectives import sent_bytes
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.split import Stages
from moesaic.train.config import TrainConfig
from moesaic.train.flops import known_peak
from moesaic.train.metrics import EXPERT_LOAD, ROUTER_ENTROPY, Value, busiest
from moesaic.train.pipelining import of_all_stages, whole_load
from moesaic.train.runtime import peak_memory
from moesaic.train.schedule import learning_rate
from moesaic.train.step import StepResult
from moesaic.train.training import Training


@dataclass
class Watched:
    """What one step has shown on this rank.

    Attributes:
        entropy: of each router, by name, the sum over its tokens of the entropy of their scores, and how many there
            were: ``[2]``.
        sent: bytes that went to other ranks.
    """

    entropy: dict[str, Tensor]
    sent: int = 0


@contextmanager
def watching(model: nn.Module, wanted: bool) -> Iterator[Watched | None]:
    """Measure the step inside, if wanted. No number is read from the device."""
    if not wanted:
        yield None
        return
    watched = Watched({})
    hooks = []
    for name, router in routers(model).items():
        total = torch.zeros(2, dtype=torch.float32, device=router.load.device)
        watched.entropy[name] = total
        hooks.append(router.register_forward_hook(_entropy_into(total)))
    before = sent_bytes()
    try:
        yield watched
        watched.sent = sent_bytes() - before
    finally:
        for hook in hooks:
            hook.remove()


def _entropy_into(total: Tensor) -> Any:
    @torch.no_grad()
    def hook(router: TopKRouter, inputs: tuple[Any, ...], routing: Routing) -> None:
        if routing.logits is None:
            return
        logits = routing.logits.detach().float()
        scores = logits.softmax(-1) if router.config.score == "softmax" else logits.sigmoid()
        shares = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        entropy = torch.special.entr(shares).sum(-1)
        # Padding has no expert.
        real = (routing.ids[:, 0] >= 0).to(entropy.dtype)
        # An operator, and none of what runs again counts: a policy of checkpointing counts operators.
        count_once(total, torch.stack([(entropy * real).sum(), real.sum()]))

    return hook


def metrics_of(
    training: Training,
    config: TrainConfig,
    meshes: Meshes,
    device: torch.device,
    result: StepResult,
    watched: Watched,
    seconds: float,
) -> dict[str, Value]:
    """The metrics of a step that took so many seconds. Collective."""
    loads = whole_load(training.model)
    stages = training.model if isinstance(training.model, Stages) else None
    memory = torch.tensor(float(peak_memory(device)), device=device)
    sums = torch.stack([*watched.entropy.values(), memory.new_tensor([float(watched.sent), 0.0])]).double()
    if ranks.active():
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        # Ranks of other stages have other routers.
        dist.all_reduce(sums, group=None if stages is None else stages.meshes.all_ranks())
    *of_routers, (sent, _) = sums.tolist()
    entropy = {
        name.rpartition(".")[0]: total / max(tokens, 1) / math.log(router.config.num_experts)
        for (name, router), (total, tokens) in zip(routers(training.model).items(), of_routers, strict=True)
        if router.config.num_experts > 1
    }
    if stages is not None:
        entropy = of_all_stages(stages, entropy)
        sent = sum(ranks.gather(sent, stages.meshes.stages))
    tokens = config.batch_size * training.loader.rows.seq_len
    per_second = tokens / seconds
    values: dict[str, Value] = {
        "loss": result.loss,
        "balance_loss": result.balance_loss,
        "grad_norm": result.grad_norm,
        "lr": learning_rate(training.step - 1, config),
        "tokens": float(training.step * tokens),
        "tokens_per_second": per_second,
        "balance": max(map(busiest, loads.values()), default=0.0),
        "dead_experts": float(sum(load.count(0) for load in loads.values())),
        "memory_gib": memory.item() / 2**30,
        "sent_mib": sent / 2**20,
        **_arithmetic(training, config, device, per_second),
    }
    if config.compile and stages is not None:
        # Compiled stages attach their balance losses, and do not tell the values.
        del values["balance_loss"]
    if entropy:
        values["router_entropy"] = sum(entropy.values()) / len(entropy)
    if config.capacity is not None:
        values["capacity_used"] = most_copies(training.model, meshes) / config.capacity
    return values | {EXPERT_LOAD: loads, ROUTER_ENTROPY: entropy}


def _arithmetic(training: Training, config: TrainConfig, device: torch.device, per_second: float) -> dict[str, float]:
    each = training.flops_per_token * per_second / ranks.world_size() / 1e12
    peak = config.peak_tflops or known_peak(device, config.dtype)
    return {"tflops": each} | ({} if peak is None else {"mfu": each / peak})
