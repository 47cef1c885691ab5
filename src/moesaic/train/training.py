"""What a step changes: model, optimizer and place in the data. Its checkpoints are written and read here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from moesaic import checkpoint
from moesaic.checkpoint.folder import folder_name
from moesaic.checkpoint.run_folder import CHECKPOINTS
from moesaic.checkpoint.state import restore_weights, weights
from moesaic.checkpoint.store import read_into, verify
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.split import whole_of
from moesaic.train import implementations
from moesaic.train.best import Best
from moesaic.train.config import TrainConfig, to_json
from moesaic.train.errors import UserError
from moesaic.train.flops import flops_per_token
from moesaic.train.loader import BatchLoader
from moesaic.train.main_grads import MainGrads

# What a resumed run must have in common with the run before, and the flags that choose it.
_IDENTITIES = {"data": "--data", "tokenizer": "--tokenizer", "model": "--model"}


@dataclass
class Training:
    """What a step changes, on this rank."""

    model: nn.Module
    optimizer: Optimizer
    loader: BatchLoader
    identities: dict[str, str]
    """A hash each of the data, the tokenizer and the model. A checkpoint with other hashes is refused."""
    main_grads: MainGrads | None = None
    """Buffers for the gradients of expert weights, if they have any."""
    pipeline: Pipeline | None = None
    """What makes the gradients of a step, where the layers are on several stages."""
    implementations: dict[str, Any] | None = None
    """What computes this run on the CPU: see :func:`moesaic.train.implementations.settle`."""
    step: int = 0
    """How many steps are done."""
    whole: bool = True
    """Whether all weights are those after this step. They are not while the optimizer changes them."""
    saved: int = 0
    """The last step that a checkpoint has. A new model need not be saved."""
    best: Best = field(default_factory=Best)
    """What was measured best so far."""

    @cached_property
    def flops_per_token(self) -> float:
        """How much arithmetic a token is: it stays what it is, and counting goes through all modules."""
        return flops_per_token(whole_of(self.model), self.loader.rows.seq_len)


def save(training: Training, config: TrainConfig, folder: Path) -> Path:
    """Write a checkpoint into a run folder, in the background if `config` says so. Collective."""
    info = {
        "loader": training.loader.state_dict(),
        "identities": training.identities,
        "settings": to_json(config),
        implementations.KEY: training.implementations,
        "best": asdict(training.best),
    }
    state = checkpoint.training_state(training.model, training.optimizer)
    blocking = not config.async_checkpoints
    path = checkpoint.save(
        folder / CHECKPOINTS,
        training.step,
        state,
        info,
        keep=config.keep,
        blocking=blocking,
        spare=[training.best.step] if config.keep_best else [],
    )
    if blocking:
        training.saved = training.step
    return path


def restore(training: Training, folder: Path, optimizer: str) -> checkpoint.Manifest:
    """Go on where the last sound checkpoint in a run folder was written, whose manifest it returns. Collective.

    Raises `UserError` if that was with other data, another tokenizer, another model or another `optimizer`.
    """

    def check(manifest: checkpoint.Manifest) -> None:
        # Before the tensors are read: those of another model would not fit.
        then = manifest.info["identities"]
        changed = [flag for name, flag in _IDENTITIES.items() if then[name] != training.identities[name]]
        if changed:
            raise UserError(
                f"cannot continue the run in {folder}: {', '.join(changed)} had other contents before. "
                "Give the same as before, or start a new run in another folder"
            )
        # Before there was a choice it was AdamW.
        before = manifest.info["settings"].get("optimizer", "adamw")
        if before != optimizer:
            raise UserError(
                f"cannot continue the run in {folder} with --optimizer {optimizer}: its checkpoint has the state of "
                f"{before}. Leave --optimizer out, or start a new run in another folder"
            )

    state = checkpoint.training_state(training.model, training.optimizer)
    manifest = checkpoint.load(folder / CHECKPOINTS, state, check=check)
    training.loader.load_state_dict(manifest.info["loader"])
    checkpoint.restore(training.model, training.optimizer, state)
    training.step = training.saved = manifest.step
    training.best = Best(**manifest.info.get("best", {}))
    return manifest


def take_best(training: Training, folder: Path) -> None:
    """Take the weights of the step that was measured best. Collective. Raises `CheckpointError` if they are not there.

    Optimizer and step stay as they are.
    """
    place = folder / CHECKPOINTS / folder_name(training.best.step)
    verify(place)
    state = weights(training.model)
    read_into(place, state)
    restore_weights(training.model, state)
