"""What a run is told: one frozen dataclass, its checks, and its JSON form in the run folder.

The field docstrings are the text of `moesaic train --help`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moesaic.train.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Train a mixture-of-experts language model, its experts tiled over a device mesh.

    Runs in one process as it is, and on many under torchrun. A run lives in one folder: settings, metrics,
    checkpoints and, at the end, the model in Hugging Face format.
    """

    # --- text ---
    data: str = "stdlib"
    """What to learn from: 'stdlib' (the Python library's own sources), a folder of text files, a file, or the name or
    path of a dataset of the `datasets` library. Rows, of .jsonl for one, hold text or conversations: a column
    'messages', 'prompt' and 'completion', 'conversations' (ShareGPT), or 'instruction' and 'output' (Alpaca)."""
    text_column: str | None = None
    """The column that holds the text. By default 'text', if the rows are no conversations."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """What of a conversation is learned: all that the assistant says, its last message, or every token."""
    packing: bool = True
    """Put several conversations in a row of seq_len tokens, where none sees another. Without it each is padded."""
    tokenizer: str | None = None
    """A transformers tokenizer (folder or name). By default that of a pretrained --model; else a byte-level BPE with as
    many tokens as the model config's vocab_size is trained on the text, and cached."""

    # --- model ---
    model: str = "qwen3-moe-small"
    """A pretrained model of Hugging Face, a folder with weights or a name on the hub, to fine-tune. Or the shape of a
    new one: a config of this package, a config.json, or a folder with that and no weights."""
    compute: Literal["dtensor", "local"] = "dtensor"
    """How experts compute: by operators on DTensors, or on local tensors. Both give the same numbers."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast. Weights and optimizer state are fp32 whatever a pretrained model's files have."""

    # --- low-rank adapters, of a pretrained model on one process ---
    lora_rank: int = 0
    """Rank of adapters (LoRA, by the peft library), which are trained in place of the weights. 0: none."""
    lora_alpha: float | None = None
    """Their product is scaled by lora_alpha / lora_rank. By default by 2."""
    lora_on: Literal["all", "attention", "experts"] = "all"
    """What gets adapters: the projections of attention, the experts, or both."""

    # --- layout: tp * dp_shard * dp_replicate must equal the number of processes, and ep * etp must fit in it ---
    tp: int = 1
    """Tensor parallel size of the dense layers (with sequence parallelism)."""
    ep: int = 1
    """Expert parallel size: experts are split over so many ranks."""
    etp: int = 1
    """Expert tensor parallel size: each expert's matrices are split over so many ranks."""
    dp_shard: int | None = None
    """Data parallel size with sharded weights (FSDP2). By default all the ranks that are left."""
    dp_replicate: int = 1
    """Data parallel size with replicated weights, around dp_shard."""
    device: str | None = None
    """Device type: cpu, cuda, ... By default the accelerator if there is one."""

    # --- optimisation ---
    steps: int = 160
    """Optimizer steps in all."""
    batch_size: int = 16
    """Sequences in a step, over all ranks. Must divide by the number of data parallel ranks."""
    seq_len: int = 128
    """Tokens in a sequence."""
    lr: float | None = None
    """Peak learning rate. By default 3e-3 for a new model, 1e-5 for a pretrained one and 1e-4 for adapters."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after warm-up: a cosine, or stable and then (from 80 % on) linear decay."""
    warmup_steps: int = 20
    """Steps in which the learning rate rises from zero."""
    min_lr_ratio: float = 0.1
    """Last learning rate, as a part of the peak."""
    weight_decay: float | None = None
    """AdamW weight decay, of matrices only. By default 0.1 for a new model and 0 for a pretrained one."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    aux_loss_coef: float | None = None
    """Weight of the load-balancing loss. By default 0.05 for a new model; for a pretrained one its config's
    router_aux_loss_coef, or 0."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss."""
    seed: int = 0
    """Seed of the weights, the order of the data and everything else that is random."""

    # --- run folder ---
    out: Path | None = None
    """Run folder. By default a new one: runs/<date>-<time>."""
    resume: bool = False
    """Go on from the last checkpoint of --out (without --out: of the latest run in runs/). Settings are those of
    that run; flags given now override them."""
    save_every: int = 50
    """Steps between checkpoints; there is always one at the end. 0: only that one."""
    keep: int = 2
    """Checkpoints to keep."""

    # --- what is measured and shown ---
    log_every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events, if the tensorboard package is there."""
    eval_every: int = 0
    """Steps between measurements on held-out text; there is always one at the end, and one before a pretrained
    model's first step."""
    eval_bytes: int = 131_072
    """How much of the held-out text is measured, or of the held-out conversations as JSON."""
    prompt: str | None = None
    """Text that the trained model continues at the end, or what the user says in a conversation. By default
    'def main(', or a held-out conversation up to its last answer."""
    sample_tokens: int = 120
    """How many tokens of it."""


def check(config: TrainConfig) -> None:
    """Raise `UserError` for values that no run could work with. Says nothing of layouts: `resolve_layout` does."""
    at_least = {
        1: ("tp", "ep", "etp", "dp_replicate", "steps", "batch_size", "keep", "log_every", "eval_bytes"),
        2: ("seq_len",),
        0: ("save_every", "eval_every", "warmup_steps", "sample_tokens", "seed", "lora_rank"),
    }
    for least, names in at_least.items():
        for name in names:
            if getattr(config, name) < least:
                raise UserError(f"{flag(name)} must be at least {least}, not {getattr(config, name)}")
    if config.dp_shard is not None and config.dp_shard < 1:
        raise UserError(f"--dp-shard must be at least 1, not {config.dp_shard}")
    for name in ("lr", "weight_decay", "max_grad_norm", "aux_loss_coef", "z_loss_coef", "lora_alpha"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{flag(name)} must be a number from 0 on, not {value}")
    if config.lr == 0:
        raise UserError("--lr must be more than 0")
    if not 0 <= config.min_lr_ratio <= 1:
        raise UserError(f"--min-lr-ratio must be between 0 and 1, not {config.min_lr_ratio}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"--betas must be at least 0 and less than 1, not {config.betas}")


def with_defaults(config: TrainConfig, *, pretrained: bool, aux_loss_coef: float) -> TrainConfig:
    """The config with the values that depend on whether a model is new; `aux_loss_coef` is a pretrained model's own."""
    defaults = {
        "lr": 1e-4 if config.lora_rank else 1e-5 if pretrained else 3e-3,
        "weight_decay": 0.0 if pretrained else 0.1,
        "aux_loss_coef": aux_loss_coef if pretrained else 0.05,
    }
    missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def flag(name: str) -> str:
    """The command line's name of a field: `--dp-shard` of `dp_shard`."""
    return "--" + name.replace("_", "-")


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON values; `from_json` gives the same config back."""
    values = dataclasses.asdict(config)
    values["out"] = None if config.out is None else str(config.out)
    values["betas"] = list(config.betas)
    # Each call says for itself whether it resumes.
    del values["resume"]
    return values


# Settings of older runs, and what they are called today.
_RENAMED = {"experts": "compute"}


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The config that `to_json` was given, also of an older version. Unknown names raise `UserError`."""
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown settings {', '.join(unknown)}: written by another version of moesaic?")
    if values.get("out") is not None:
        values["out"] = Path(values["out"])
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return TrainConfig(**values)


def read_settings(path: Path) -> TrainConfig:
    """The settings in a run folder's config.json."""
    try:
        return from_json(json.loads(path.read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the settings of the run in {path}: {error}") from error
