"""One run of torchtitan's Trainer, as its command line builds it, on fixed weights and tokens."""

import contextlib
import gc
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tests.distributed.parity import whole
from tests.torchtitan import cpu

MODELS = ("qwen3", "deepseek_v3", "gpt_oss")
DEGREES = ("dp_replicate", "tp", "cp", "pp", "ep", "etp")
PACKAGE = "moesaic.integrations.torchtitan"
BATCH = 8


@dataclass(frozen=True)
class Case:
    """What to run. Degrees are torchtitan's: `ep` is its expert_parallel_degree, of which `etp` is a part.

    Attributes:
        override: `experts`, `routed_experts`, `moe`, or nothing for torchtitan's own.
        options: keyword arguments of the override beside `etp`, by name.
        forced: tokens go to experts in turn, whatever the router says.
        accumulate: passes a step.
        more: further words of the command line.
    """

    model: str = "qwen3"
    override: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    dp_replicate: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    backend: str = "partial_dtensor"
    steps: int = 3
    dtype: str = "float32"
    ac: str = "none"
    forced: bool = False
    accumulate: int = 1
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        degrees = [f"{k} {v}" for k in DEGREES if (v := getattr(self, k)) > 1]
        words = [self.model, self.override or "stock", *(f"{k} {v}" for k, v in self.options), *degrees]
        words += [self.backend] * (self.backend != "partial_dtensor") + [self.ac] * (self.ac != "none")
        words += ["forced"] * self.forced + [f"accumulated {self.accumulate}"] * (self.accumulate > 1)
        return " ".join([*words, *[self.dtype] * (self.dtype != "float32"), *self.more])

    def stock(self) -> "Case":
        return replace(self, override="", options=(), etp=1)

    def alone(self) -> "Case":
        """torchtitan's own on one process: what all layouts and overrides are compared with."""
        return Case(self.model, steps=self.steps, dtype=self.dtype, forced=self.forced)

    def arguments(self, world_size: int, folder: str = "") -> list[str]:
        """The command line behind `-m torchtitan.train`."""
        dp = world_size // (self.tp * self.cp * self.pp)
        flags = {
            "training.steps": self.steps,
            "training.local-batch-size": BATCH // dp // self.accumulate,
            "training.global-batch-size": BATCH,
            "training.mixed-precision-param": self.dtype,
            "training.mixed-precision-reduce": "float32",
            "parallelism.spmd-backend": self.backend,
            "parallelism.data-parallel-replicate-degree": self.dp_replicate,
            "parallelism.tensor-parallel-degree": self.tp,
            "parallelism.context-parallel-degree": self.cp,
            "parallelism.pipeline-parallel-degree": self.pp,
            "parallelism.expert-parallel-degree": self.ep,
        }
        if folder:
            flags["dump-folder"] = folder
        words = ["--module", "tests.torchtitan.models", "--config", self.model]
        words += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        if self.override:
            options = ({"etp": self.etp} if self.etp > 1 else {}) | dict(self.options)
            words += ["--override.imports", f"{PACKAGE}.{self.override}" + f"={json.dumps(options)}" * bool(options)]
        words += ["--debug.moe-force-load-balance"] * self.forced
        return [*words, *self.more, f"activation-checkpoint:{self.ac}"]


@dataclass
class Record:
    """What a run gave, on each rank: gradients and weights of its pipeline stage, losses where its trainer has them."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    flops: int = 0
    size: int = 0


def run(case: Case, words: list[str] | None = None) -> Record:
    """Train on the ranks that call this; ``words`` are another command line for the same."""
    record = Record()
    with fresh(case), trainer_of(case, words=words) as trainer, recorded(trainer, record):
        set_weights(trainer)
        trainer.train()
        record.weights = {name: whole(p).clone() for name, p in parameters(trainer)}
        record.flops = trainer.metrics_processor.num_flops_per_token
        for part in trainer.model_parts:
            record.buffers |= {bare(name): whole(b).clone() for name, b in part.named_buffers() if "_E" in name}
    if dist.get_rank() % (dist.get_world_size() // case.pp):  # one rank of each stage is enough
        record.grads, record.weights, record.buffers = {}, {}, {}
    return record


@contextlib.contextmanager
def fresh(case: Case) -> Iterator[None]:
    """As in a new process. Stock experts compute in fp32 where the case does."""
    cpu.install()
    # DTensor would hand out the mesh of an earlier run that equals this one's, and FSDP asks for the very object.
    _clear_sharding_prop_cache()
    with cpu.stock_in_fp32() if not case.override and case.dtype == "float32" else contextlib.nullcontext():
        yield
    gc.collect()  # torchtitan turns that off


def merged(records: list[Record]) -> Record:
    """What all pipeline stages have, together. Only the last knows the loss."""
    whole_model = Record(records[-1].losses, records[-1].norms, flops=records[-1].flops)
    for record in records:
        for name in ("grads", "weights", "buffers"):
            getattr(whole_model, name).update(getattr(record, name))
    whole_model.size = sum(w.numel() for w in whole_model.weights.values())
    return whole_model


@contextlib.contextmanager
def trainer_of(case: Case, folder: str = "", words: list[str] | None = None) -> Iterator[Any]:
    from torchtitan.config import ConfigManager

    words = words or case.arguments(dist.get_world_size(), folder)
    trainer = ConfigManager().parse_args(words).build()
    try:
        yield trainer
    finally:
        trainer.close()


@contextlib.contextmanager
def recorded(trainer: Any, record: Record) -> Iterator[None]:
    """Keep each step's loss and norm as torchtitan logs them, and the first step's gradients, before they are cut."""
    import torchtitan.distributed.utils as utils

    stock = utils.clip_grad_norm_

    def clip(parameters_: Any, *args: Any, **options: Any) -> Tensor:
        if not record.grads:
            record.grads = {name: whole(p.grad).clone() for name, p in parameters(trainer) if p.grad is not None}
        return stock(parameters_, *args, **options)

    def log(step: int, loss: float, _: float, norm: float, **__: object) -> None:
        record.losses.append(float(loss))
        record.norms.append(norm)

    with mock.patch.object(utils, "clip_grad_norm_", clip):
        trainer.metrics_processor.log = log
        yield


def parameters(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    for part in trainer.model_parts:
        for name, parameter in part.named_parameters():
            yield bare(name), parameter


def bare(name: str) -> str:
    """Without what recomputation and the compiler put into names."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def set_weights(trainer: Any) -> None:
    """Numbers that depend on a parameter's name alone."""
    for part in trainer.model_parts:
        weights = {bare(name): drawn(bare(name), p.shape) for name, p in part.named_parameters()}
        set_model_state_dict(part, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def drawn(name: str, shape: torch.Size) -> Tensor:
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=seed) * 0.05 + ("norm" in name)
