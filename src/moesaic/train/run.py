"""Set up a run on this rank: text, model, optimizer, order of the data."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moesaic import ranks
from moesaic.checkpoint.run_folder import CONFIG, TOKENIZER
from moesaic.ops import fastest
from moesaic.parallel.build import build_meshes
from moesaic.parallel.mesh import Meshes, sizes_in
from moesaic.train import implementations
from moesaic.train import model as models
from moesaic.train.architecture import ModelSource, find_model
from moesaic.train.compiled import compile_layers
from moesaic.train.config import TrainConfig, to_json, with_absolute_paths, with_defaults
from moesaic.train.errors import UserError
from moesaic.train.fit import fit_seq_len
from moesaic.train.folder import again_folder, check_free, new_folder, resumable_folder, settle_resume, write_json
from moesaic.train.guard import ForwardGuard
from moesaic.train.loader import BatchLoader, Rows, Windows
from moesaic.train.lock import RunLock
from moesaic.train.lora import adapter_config, describe, write_adapter_config
from moesaic.train.main_grads import MainGrads
from moesaic.train.optimizer import build_optimizer
from moesaic.train.packing import PackedRows, check_apart
from moesaic.train.pipelining import passes, pipeline_of
from moesaic.train.prepare import cache_folder, open_prepared, prepare
from moesaic.train.prepared import PreparedConversations, PreparedText
from moesaic.train.runtime import Runtime
from moesaic.train.sets import EvalSet, read_eval_sets
from moesaic.train.training import Training, restore


@dataclass(frozen=True)
class Run:
    """The parts of a run on this rank. Only `training` changes."""

    training: Training
    folder: Path
    config: TrainConfig
    runtime: Runtime
    text: PreparedText | PreparedConversations
    meshes: Meshes
    sets: tuple[EvalSet, ...]
    """What is measured beside the held-out data."""
    guard: ForwardGuard
    source: ModelSource
    """What `--model` names."""
    lock: RunLock | None
    """On the leader."""

    @property
    def pretrained(self) -> bool:
        """Whether there were weights to begin with."""
        return self.source.pretrained

    def close(self) -> None:
        """Let go of the model's hooks, of the run's choice of implementations and of the folder."""
        self.guard.close()
        fastest.use(None)
        if self.lock is not None:
            self.lock.release()


def set_up(config: TrainConfig, runtime: Runtime, notify: Callable[[str], None]) -> Run:
    """Build a run in a new folder, or continue from its last checkpoint if `config.resume`. Collective."""
    config = ranks.on_leader(lambda: settle_resume(config))
    _check_same_on_all_ranks("settings", to_json(config))
    source = find_model(config.model)
    own_coef = models.own_aux_loss_coef(source)
    config = with_defaults(config, pretrained=source.pretrained, own_aux_loss_coef=own_coef)
    text = prepare_on_ranks(config, source, runtime, notify)
    config = fit_seq_len(config, text, source.text_values.get("max_position_embeddings"), notify)
    sets = read_eval_sets(config, text.tokenizer(), notify) if config.eval_data else ()
    meshes = build_meshes(**sizes_in(config), device_type=runtime.device.type, ranks_per_node=config.ranks_per_node)
    implementations.tell_of_missing_kernels(runtime.device, notify)
    loader = BatchLoader(
        _rows(text, config, notify),
        batch_size=config.batch_size,
        seed=config.seed,
        dp_rank=meshes.dp_rank,
        dp_size=meshes.dp_size,
        passes=passes(config),
    )
    if source.pretrained:
        notify(f"loading {config.model} ({source.values['model_type']}) to fine-tune it; computing in {config.dtype}")
        adapter = ranks.together(lambda: adapter_config(config, source))[0]
        model = models.load_model(config, source, meshes, runtime.device, vocab_size=text.vocab_size, adapter=adapter)
        identity = models.identity(model.config)
        if config.lora_rank:
            identity += f", {describe(config)}"
    else:
        architecture = models.model_config(source.values, vocab_size=text.vocab_size, eos_id=text.eos_id)
        model = models.build_model(config, architecture, meshes, runtime.device)
        identity = models.identity(architecture)
    of_training = isinstance(loader.rows, PackedRows) and loader.rows.shared
    if of_training or any(one.measured.shared for one in sets):
        check_apart(model, meshes, vocab_size=text.vocab_size, device=runtime.device)
    identities = {"data": text.data_identity, "tokenizer": text.tokenizer_identity, "model": identity}
    main_grads = MainGrads(model) if config.main_grads else None
    training = Training(model, build_optimizer(model, config), loader, identities, main_grads)
    training.pipeline = pipeline_of(model, config)
    # After all checks, so that a mistake leaves no folder behind.
    folder, lock = _claim_folder(config)
    config = dataclasses.replace(config, out=folder)

    def describe_run() -> None:
        if config.resume is True and config.aux_loss_coef:
            _tell_of_balance_loss(folder, config, source.pretrained, own_coef, notify)
        try:
            write_json(folder / CONFIG, _describe(training, config, text.train_bytes, runtime.world_size))
            if config.lora_rank:
                write_adapter_config(model, folder)
            shutil.copytree(text.folder / "tokenizer", folder / TOKENIZER, dirs_exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into the run folder {folder}: {error.strerror or error}") from error

    try:
        if config.resume is True:
            manifest = restore(training, folder, config.optimizer)
            if training.step > config.steps:
                raise UserError(
                    f"--steps {config.steps}: the run in {folder} has done {training.step} steps already; give more, "
                    "or leave --steps out"
                )
            if not config.choose_again:
                implementations.take_up(manifest.info.get(implementations.KEY), runtime.device, folder, notify)
        training.implementations = implementations.settle(runtime.device)
        ranks.on_leader(describe_run)
    except BaseException:
        fastest.use(None)
        if lock is not None:
            lock.release()
        raise
    guard = ForwardGuard(model, runtime.device)
    if config.compile:
        compile_layers(model)
    return Run(training, folder, config, runtime, text, meshes, sets, guard, source, lock)


def _claim_folder(config: TrainConfig) -> tuple[Path, RunLock | None]:
    lock: RunLock | None = None

    def claim() -> Path:
        # Not given back: results go to all ranks, and the lock is this process's.
        nonlocal lock
        if config.resume is True:
            folder = resumable_folder(config.out)
        else:
            folder = again_folder(config.out) if config.resume else new_folder(config.out)
        claimed = RunLock(folder)
        try:
            if not config.resume:
                # Another run may have been in it between the look and the lock.
                check_free(folder)
        except UserError:
            claimed.release()
            raise
        lock = claimed
        return folder

    return ranks.on_leader(claim), lock


def _tell_of_balance_loss(
    folder: Path, config: TrainConfig, pretrained: bool, own_coef: float | None, notify: Callable[[str], None]
) -> None:
    """Say so if the coefficient of the balance loss is now for another loss, or one that a new run would not have."""
    then = json.loads((folder / CONFIG).read_text())["settings"]
    coefficient = f"--aux-loss-coef {config.aux_loss_coef:g}"
    if (before := then.get("aux_loss", "batch")) != config.aux_loss:
        notify(f"{coefficient} is now for another balance loss: --aux-loss {config.aux_loss}, and it was {before}")
    elif "aux_loss" not in then and pretrained:
        new = "0" if own_coef is None else f"{own_coef:g} with --aux-loss pooled"
        notify(
            f"{coefficient} is from an older version of moesaic, which took it from the model's config. It goes on as "
            f"before: times a loss of each layer, added up, but now without padding. A new run would have {new}; "
            "--aux-loss-coef 0 turns it off"
        )


def _rows(text: PreparedText | PreparedConversations, config: TrainConfig, notify: Callable[[str], None]) -> Rows:
    assert config.seq_len is not None  # fit_seq_len has seen to it
    if isinstance(text, PreparedText):
        return Windows(text.tokens(), config.seq_len)
    rows = PackedRows(text.train(), config.seq_len, packed=config.packing, pad_id=text.eos_id)
    total = len(rows.conversations.ends)
    if rows.cut:
        notify(rows.describe_cut(f"--seq-len {config.seq_len}"))
    if rows.left_out:
        notify(f"{rows.left_out} of {total} conversations have nothing to learn within --seq-len; they are left out")
    rows.check_not_empty()
    return rows


def prepare_on_ranks(
    config: TrainConfig, source: ModelSource, runtime: Runtime, notify: Callable[[str], None]
) -> PreparedText | PreparedConversations:
    """The text of a run, which the first process of each host prepares. Collective. Raises `UserError` on all ranks.

    `source` is what `--model` names.
    """

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

    names = [name for name in ranks.together(on_host_leader) if name is not None]
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


def _describe(training: Training, config: TrainConfig, train_bytes: int, world_size: int) -> dict[str, Any]:
    return {
        "settings": to_json(with_absolute_paths(config)),
        "world_size": world_size,
        "parameters": models.num_parameters(training.model),
        "train_bytes": train_bytes,
        implementations.KEY: training.implementations,
        "versions": {
            "moesaic": metadata.version("moesaic"),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "model": training.model.config.to_dict(),  # type: ignore[attr-defined]
    }
