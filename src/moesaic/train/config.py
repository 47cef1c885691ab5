"""The settings of a run: one frozen dataclass, its checks, and its JSON form in the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.train.errors import UserError
from moesaic.train.flags import (
    AdapterOptions,
    LayoutOptions,
    MeasuringOptions,
    ModelOptions,
    OptimisationOptions,
    RunOptions,
    TextOptions,
)


@dataclass(frozen=True)
class TrainConfig(
    TextOptions, ModelOptions, AdapterOptions, LayoutOptions, OptimisationOptions, RunOptions, MeasuringOptions
):
    """Train a mixture-of-experts language model. Its experts are split over a device mesh.

    Runs in one process, or in many under torchrun. Each run has a folder with its settings, metrics and checkpoints,
    and at the end the model in Hugging Face format.
    """


def check(config: TrainConfig) -> None:
    """Raise `UserError` for values that cannot work in any run. Layouts are checked by `resolve_layout`."""
    at_least = {
        1: (
            *("pp", "tp", "cp", "ep", "etp", "dp_replicate", "ranks_per_node", "capacity", "steps"),
            *("batch_size", "accumulate", "keep", "log_every", "eval_bytes", "timeout"),
        ),
        2: ("seq_len",),
        0: ("save_every", "eval_every", "warmup_steps", "sample_tokens", "seed", "lora_rank", "early_stop"),
    }
    for least, names in at_least.items():
        for name in names:
            if getattr(config, name) is not None and getattr(config, name) < least:
                raise UserError(f"{flag(name)} must be at least {least}, not {getattr(config, name)}")
    if config.dp_shard is not None and config.dp_shard < 1:
        raise UserError(f"--dp-shard must be at least 1, not {config.dp_shard}")
    if config.optimizer != "muon":
        unused = [field for field in dataclasses.fields(config) if field.name.startswith("muon_")]
        if given := [field.name for field in unused if getattr(config, field.name) != field.default]:
            raise UserError(f"{flag(given[0])} is for Muon; add --optimizer muon, or leave it out")
    if not 0 <= config.muon_momentum < 1:
        raise UserError(f"--muon-momentum must be at least 0 and below 1, not {config.muon_momentum}")
    if not 1 <= config.muon_steps < 100:
        raise UserError(f"--muon-steps must be from 1 to 99, not {config.muon_steps}")
    for name in ("lr", "muon_lr", "weight_decay", "max_grad_norm", "aux_loss_coef", "z_loss_coef", "lora_alpha"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{flag(name)} must be a number, 0 or more, not {value}")
    if config.dtype == "pure-bf16":
        raise UserError(
            "--dtype pure-bf16: weights in bf16 lose each update that is less than 1/256 of the weight. Stochastic "
            "rounding keeps them on average, at the price of noise in every step, and moesaic does not have it; use "
            "--dtype bf16, which computes in bf16 with weights and optimizer state in fp32"
        )
    if config.choose_again and not config.resume:
        raise UserError("--choose-again: a new run chooses anyway; add --resume to continue one")
    if not 0 <= config.lora_dropout < 1:
        raise UserError(f"--lora-dropout must be at least 0 and below 1, not {config.lora_dropout}")
    for name in ("early_stop", "keep_best"):
        if getattr(config, name) and not config.eval_every:
            raise UserError(f"{flag(name)} needs measurements: give --eval-every, the steps between them")
    for name in ("lr", "muon_lr"):
        if getattr(config, name) == 0:
            raise UserError(f"{flag(name)} must be more than 0")
    if config.peak_tflops is not None and not 0 < config.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops must be a number above 0, not {config.peak_tflops}")
    profiled_steps(config.profile_steps)
    if not 0 <= config.min_lr_ratio <= 1:
        raise UserError(f"--min-lr-ratio must be between 0 and 1, not {config.min_lr_ratio}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"--betas must be at least 0 and below 1, not {config.betas}")


def profiled_steps(text: str | None) -> range:
    """The steps that `--profile-steps` names, such as 10 or 10:12, the last one included.

    Raises `UserError` if it names none.
    """
    if text is None:
        return range(0)
    first, colon, last = text.partition(":")
    try:
        steps = range(int(first), int(last if colon else first) + 1)
    except ValueError:
        steps = range(0)
    if not steps or steps[0] < 1:
        raise UserError(f"--profile-steps {text}: give a step, or the first and the last of several, such as 10:12")
    return steps


def with_defaults(config: TrainConfig, *, pretrained: bool, own_aux_loss_coef: float | None) -> TrainConfig:
    """Fill in the defaults that depend on the model and on other settings. `seq_len` depends on the data, see `fit`.

    `own_aux_loss_coef` is what transformers multiplies its balance loss of a pretrained model by, None where it adds
    none.
    """
    defaults = {
        "lr": 1e-4 if config.lora_rank else 1e-5 if pretrained else 3e-3,
        "weight_decay": 0.0 if pretrained else 0.1,
        "aux_loss_coef": (own_aux_loss_coef or 0.0) if pretrained else 0.05,
        "aux_loss": "batch" if own_aux_loss_coef is None else "pooled",
        # The default of 160 steps has 20.
        "warmup_steps": min(20, config.steps // 8),
    }
    missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def flag(name: str) -> str:
    """The flag of a field on the command line: `--dp-shard` for `dp_shard`."""
    return "--" + name.replace("_", "-")


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same settings for a process in any directory: names of files and folders that are there become absolute."""

    def absolute(name: str | None) -> str | None:
        path = None if name in (None, "stdlib") else Path(str(name)).expanduser()
        return name if path is None or not path.exists() else str(path.absolute())

    paths: dict[str, Any] = {name: absolute(getattr(config, name)) for name in ("data", "model", "tokenizer")}
    paths["eval_data"] = tuple(absolute(name) for name in config.eval_data)
    return dataclasses.replace(config, **paths)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values. `from_json` turns them back into the same config."""
    values = dataclasses.asdict(config)
    values["out"] = None if config.out is None else str(config.out)
    values["betas"] = list(config.betas)
    values["eval_data"] = list(config.eval_data)
    values["layers_per_stage"] = list(config.layers_per_stage)
    # Every call decides for itself whether to resume, and how.
    del values["config"], values["resume"], values["choose_again"]
    return values


# Settings of older runs, and what they are called today.
_RENAMED = {"experts": "compute"}


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The config that `to_json` was given, also of an older version. Unknown names raise `UserError`."""
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown settings {', '.join(unknown)}; another version of moesaic wrote them")
    # Before there was a choice.
    values.setdefault("aux_loss", "batch")
    if values.get("out") is not None:
        values["out"] = Path(values["out"])
    for name in {"betas", "eval_data", "layers_per_stage"} & values.keys():
        values[name] = tuple(values[name])
    return TrainConfig(**values)


def read_settings(path: Path) -> TrainConfig:
    """The settings in a run folder's config.json."""
    try:
        return from_json(json.loads(path.read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the settings of the run in {path}: {error}") from error
