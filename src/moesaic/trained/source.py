"""A trained model: the folder or name that a user gives, which weights it means, and how they are loaded."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from moesaic.checkpoint import checkpoints
from moesaic.checkpoint.folder import MANIFEST, step_of
from moesaic.checkpoint.run_folder import CHECKPOINTS, CONFIG, EXPORT, RESULT
from moesaic.integrations.transformers import load_pretrained
from moesaic.integrations.transformers.run_weights import load_run, tokenizer_of
from moesaic.parallel.mesh import Meshes
from moesaic.train import tokenizer as tokenizers
from moesaic.train.architecture import find_model
from moesaic.train.config import TrainConfig, read_settings
from moesaic.train.errors import UserError
from moesaic.train.hub import check_is_name
from moesaic.train.model import quiet

_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """Where the weights are: an export or another checkpoint of transformers, or a checkpoint of `moesaic train`."""

    weights: str
    """A folder, or a name on the hub."""
    run: Path | None = None
    """The run folder that it is in, if it is in one."""
    step: int | None = None
    """The step of the run that it is from."""
    of_transformers: bool = True

    def __str__(self) -> str:
        return self.weights if self.step is None else f"{self.weights} (step {self.step})"

    @property
    def settings(self) -> TrainConfig | None:
        """The settings of the run, if there is one that has trained."""
        if self.run is None or not _is_of_training(self.run):
            return None
        return read_settings(self.run / CONFIG)


def find(name: str) -> Trained:
    """What a user means by `name`: a run folder, one of its checkpoints, an export, or a model with weights.

    Of a run folder it is the export, if that is of the last step; else the newest checkpoint. Raises `UserError`.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        path = path.absolute()
        return Trained(str(path), path.parents[1], step_of(path), of_transformers=False)
    saved = checkpoints(path / CHECKPOINTS)
    if saved or _is_of_training(path):
        return _of_run(path, saved)
    if not path.exists():
        check_is_name("SOURCE", name)
    try:
        source = find_model(name)
    except UserError as error:
        raise UserError(str(error).removeprefix("--model ")) from error
    if source.weights is None:
        raise UserError(f"{name}: there are no weights in it; give a run folder, an export, or a model with weights")
    return Trained(source.weights)


def _of_run(run: Path, saved: list[Path]) -> Trained:
    exported: int | None = None
    if (run / EXPORT / "config.json").is_file():
        exported = 0
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            exported = int(json.loads((run / RESULT).read_text())["step"])
    newest = step_of(saved[-1]) if saved else -1
    if exported is not None and exported >= newest:
        return Trained(str(run / EXPORT), run, exported or None)
    if saved:
        return Trained(str(saved[-1]), run, newest, of_transformers=False)
    raise UserError(f"{run}: the run has neither an export nor a checkpoint yet; go on with moesaic train --resume")


def _is_of_training(path: Path) -> bool:
    """Whether a folder is one of `moesaic train`."""
    try:
        values = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "settings" in values


def load(source: Trained, meshes: Meshes, device: torch.device, dtype: Literal["auto", "fp32", "bf16"]) -> Any:
    """The model, sharded over meshes, in eval mode. Collective. Raises `UserError`, or `CheckpointError` for damage.

    `auto` is the dtype of the files; of a checkpoint of training it is fp32.
    """
    try:
        with quiet():
            if source.of_transformers:
                return load_pretrained(source.weights, meshes, dtype=_DTYPES[dtype], device=device)
            assert source.run is not None
            wanted = _DTYPES[dtype] or torch.float32
            return load_run(Path(source.weights), source.run, meshes, device, dtype=wanted)
    except (ValueError, OSError, NotImplementedError, SafetensorError) as error:
        raise UserError(f"{source.weights}: {error}") from error


def load_tokenizer(source: Trained) -> Any:
    """The tokenizer of the model. Raises `UserError`."""
    if source.of_transformers:
        return tokenizers.load(source.weights, "the tokenizer of")
    assert source.run is not None
    return tokenizers.load(tokenizer_of(source.run), "the tokenizer of")
