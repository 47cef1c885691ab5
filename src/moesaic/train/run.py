"""Set up a run on this rank: text, model, optimizer, data order. Write and read its checkpoints."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from moesaic import checkpoint, ranks
from moesaic.checkpoint.run_folder import CHECKPOINTS, CONFIG, TOKENIZER
from moesaic.parallel.mesh import Meshes, build_meshes, sizes_in
from moesaic.train import model as models
from moesaic.train.architecture import ModelSource, find_model
from moesaic.train.config import TrainConfig, to_json, with_defaults
from moesaic.train.errors import UserError
from moesaic.train.folder import new_folder, resumable_folder, write_json
from moesaic.train.guard import ForwardGuard
from moesaic.train.loader import BatchLoader, Rows, Windows
from moesaic.train.lora import add_adapters, alpha_of
from moesaic.train.packing import PackedRows, check_apart
from moesaic.train.prepare import cache_folder, open_prepared, prepare
from moesaic.train.prepared import PreparedConversations, PreparedText
from moesaic.train.runtime import Runtime

# What a resumed run must have in common with the run before, and the flags that choose it.
_IDENTITIES = {"data": "--data", "tokenizer": "--tokenizer", "model": "--model"}


@dataclass
class Run:
    """All parts of a run on this rank."""

    config: TrainConfig
    runtime: Runtime
    folder: Path
    source: ModelSource
    text: PreparedText | PreparedConversations
    meshes: Meshes
    model: nn.Module
    optimizer: Optimizer
    loader: BatchLoader
    guard: ForwardGuard
    adapters: Any
    """The peft model around the model, if there are low-rank adapters; else None."""
    identities: dict[str, str]
    step: int = 0
    """How many steps are done."""

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / CHECKPOINTS


def set_up(config: TrainConfig, runtime: Runtime, notify: Callable[[str], None]) -> Run:
    """Build a run in a new folder, or continue from its last checkpoint if `config.resume`. Collective."""
    _check_same_on_all_ranks("settings", to_json(config))
    source = find_model(config.model)
    own_coef = source.text_values.get("router_aux_loss_coef") or 0.0
    config = with_defaults(config, pretrained=source.pretrained, aux_loss_coef=own_coef)
    text = _prepare_text(config, source, runtime, notify)
    meshes = build_meshes(**sizes_in(config), device_type=runtime.device.type)
    loader = BatchLoader(
        _rows(text, config, notify),
        batch_size=config.batch_size,
        seed=config.seed,
        dp_rank=meshes.dp_rank,
        dp_size=meshes.dp_size,
    )
    adapters: Any = None
    if source.pretrained:
        notify(f"loading {config.model} ({source.values['model_type']}) to fine-tune it; computing in {config.dtype}")
        model = models.load_model(config, source, meshes, runtime.device, vocab_size=text.vocab_size)
        identity = models.identity(model.config)
        if config.lora_rank:
            adapters = add_adapters(model, config)
            scale = f"alpha {alpha_of(config):g}"
            identity += f", adapters of rank {config.lora_rank} and {scale} on {config.lora_on}"
    else:
        architecture = models.model_config(source.values, vocab_size=text.vocab_size, eos_id=text.eos_id)
        model = models.build_model(config, architecture, meshes, runtime.device)
        identity = models.identity(architecture)
    if isinstance(loader.rows, PackedRows) and loader.rows.shared:
        check_apart(model, meshes, vocab_size=text.vocab_size, device=runtime.device)
    # After all checks, so that a mistake leaves no folder behind.
    choose = resumable_folder if config.resume else new_folder
    folder = ranks.on_leader(lambda: choose(config.out), UserError)
    run = Run(
        config=dataclasses.replace(config, out=folder),
        runtime=runtime,
        folder=folder,
        source=source,
        text=text,
        meshes=meshes,
        model=model,
        optimizer=models.build_optimizer(model, config),
        loader=loader,
        guard=ForwardGuard(model, runtime.device),
        adapters=adapters,
        identities={
            "data": text.data_identity,
            "tokenizer": text.tokenizer_identity,
            "model": identity,
        },
    )
    if config.resume:
        _restore(run)
    if runtime.leader:
        write_json(folder / CONFIG, _describe(run))
        shutil.copytree(text.folder / "tokenizer", folder / TOKENIZER, dirs_exist_ok=True)
    return run


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it is now. Collective."""
    info = {"loader": run.loader.state_dict(), "identities": run.identities, "settings": to_json(run.config)}
    state = checkpoint.training_state(run.model, run.optimizer)
    return checkpoint.save(run.checkpoints, run.step, state, info, keep=run.config.keep)


def _restore(run: Run) -> None:
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    # Before the tensors are read: those of another model would not fit.
    _check_identities(checkpoint.read_manifest(newest).info, run)
    state = checkpoint.training_state(run.model, run.optimizer)
    manifest = checkpoint.load(run.checkpoints, state)
    run.loader.load_state_dict(manifest.info["loader"])
    checkpoint.restore(run.model, run.optimizer, state)
    run.step = manifest.step


def _check_identities(info: dict[str, Any], run: Run) -> None:
    then = info["identities"]
    changed = [flag for name, flag in _IDENTITIES.items() if then[name] != run.identities[name]]
    if changed:
        raise UserError(
            f"cannot continue the run in {run.folder}: {', '.join(changed)} had other contents before. "
            "Give the same as before, or start a new run in another folder"
        )


def _rows(text: PreparedText | PreparedConversations, config: TrainConfig, notify: Callable[[str], None]) -> Rows:
    if isinstance(text, PreparedText):
        return Windows(text.tokens(), config.seq_len)
    rows = PackedRows(text.train(), config.seq_len, packed=config.packing, pad_id=text.eos_id)
    total = len(rows.conversations.ends)
    if rows.cut:
        notify(f"{rows.cut} of {total} conversations are longer than --seq-len {config.seq_len}; they are cut")
    if rows.left_out:
        notify(f"{rows.left_out} of {total} conversations have nothing to learn within --seq-len; they are left out")
    if not len(rows):
        raise UserError(
            f"--seq-len {config.seq_len}: no conversation has anything to learn within this length; use a larger one"
        )
    return rows


def _prepare_text(
    config: TrainConfig, source: ModelSource, runtime: Runtime, notify: Callable[[str], None]
) -> PreparedText | PreparedConversations:
    def on_host_leader() -> str | None:
        if not runtime.host_leader:
            return None
        text = prepare(
            config.data,
            text_column=config.text_column,
            tokenizer=config.tokenizer or source.weights,
            vocab_size=source.text_values["vocab_size"],
            loss_on=config.loss_on,
            notify=notify,
        )
        return text.folder.name

    names = [name for name in ranks.together(on_host_leader, UserError, OSError) if name is not None]
    if len(set(names)) > 1:
        raise UserError("the hosts see different text; give all of them the same --data and --tokenizer")
    text = open_prepared(cache_folder() / names[0])
    _check_same_on_all_ranks("tokenizers", text.tokenizer_identity)
    return text


def _check_same_on_all_ranks(what: str, value: Any) -> None:
    try:
        ranks.agree(value, what)
    except ValueError as error:
        raise UserError(str(error)) from error


def _describe(run: Run) -> dict[str, Any]:
    return {
        "settings": to_json(run.config),
        "world_size": run.runtime.world_size,
        "parameters": models.num_parameters(run.model),
        "train_bytes": run.text.train_bytes,
        "versions": {
            "moesaic": metadata.version("moesaic"),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "model": run.model.config.to_dict(),  # type: ignore[attr-defined]
    }
