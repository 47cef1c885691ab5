"""The weights in a run folder: which checkpoint, of what model, and how to load it onto meshes without an export."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from moesaic import checkpoint
from moesaic.checkpoint.folder import MANIFEST
from moesaic.checkpoint.lazy import read_tensor, stored_tensors
from moesaic.checkpoint.run_folder import CHECKPOINTS, CONFIG, EXPORT, TOKENIZER
from moesaic.checkpoint.state import restore_weights, weights
from moesaic.checkpoint.store import read_into, verify
from moesaic.integrations.transformers.configs import config_for, damage_is_value_error, read_values
from moesaic.integrations.transformers.files import TOKENIZER_FILES
from moesaic.integrations.transformers.lazy import LazyTensor
from moesaic.integrations.transformers.loading import make_buffers, model_on_meta, part_with_peft
from moesaic.integrations.transformers.plain import is_of_adapter
from moesaic.integrations.transformers.swap import swap_moe
from moesaic.layers import quantize_
from moesaic.ops.quantized import Format
from moesaic.parallel import Meshes, parallelize
from moesaic.parallel.experts import ComputeOn
from moesaic.parallel.meta import materialize

# Of the weights among the tensors of a checkpoint.
PREFIX = "model."


def load_run(
    place: Path, run: Path, meshes: Meshes, device: torch.device, *, dtype: torch.dtype, compute: ComputeOn = "dtensor"
) -> Any:
    """The model of a checkpoint, sharded over meshes, in eval mode. Each rank keeps its own parts. Collective.

    Adapters of the run are beside the weights, and active. Experts that the run has quantised are so here, too.

    Args:
        place, run: from :func:`checkpoint_and_run`.
        dtype: of the parameters.

    Raises:
        CheckpointError: a file of the checkpoint is damaged.
        ValueError: a config of the run is damaged; there are adapters, and peft is not installed.
    """
    verify(place)
    config = config_of(run)
    adapted = has_adapters(stored_tensors(place))
    with damage_is_value_error(run / CONFIG, vars(config)):
        plain = model_on_meta(config, dtype)
        make_buffers(plain, device)
        model = swap_moe(plain)
        if (quantized := _quantized_in(run)) is not None:
            quantize_(model, quantized)
        if adapted:
            kind = part_with_peft("files").read_config_alone(run)
            part_with_peft("load").prepare_adapters(model, kind)
        parallelize(model, meshes, compute=compute)
    if not meshes.is_distributed:
        materialize(model, device)
    state = weights(model)
    read_into(place, state)
    restore_weights(model, state)
    return model.eval()


def has_adapters(stored: Iterable[str]) -> bool:
    """Whether there are adapters among the tensors of a checkpoint."""
    return any(map(is_of_adapter, stored))


def refuse_adapters(stored: Iterable[str], place: Path, remedy: str = "") -> None:
    """Raise ``ValueError`` if there are adapters among the tensors of a checkpoint; its text ends with ``remedy``."""
    if has_adapters(stored):
        raise ValueError(
            f"source: {place} has adapters beside the weights; use the export of the run, which has them merged{remedy}"
        )


def checkpoint_and_run(source: Path) -> tuple[Path, Path]:
    """The checkpoint that a folder means, and its run folder: the newest one of a run folder, or the folder itself."""
    if (source / MANIFEST).is_file():
        return source, source.absolute().parents[1]
    newest = checkpoint.latest(source / CHECKPOINTS)
    if newest is None:
        raise ValueError(f"source: there is no checkpoint in {source / CHECKPOINTS}")
    return newest, source


def config_of(run: Path) -> Any:
    """The config of the model of a run. Raises ``ValueError`` if it is damaged."""
    place = run / CONFIG
    values = read_values(place).get("model")
    if not isinstance(values, dict):
        raise ValueError(f"source: {place} does not describe a model: it has no object 'model'")
    return config_for(values, place)


def _quantized_in(run: Path) -> Format | None:
    """The format in which a run has held its experts, if they were quantised."""
    settings = read_values(run / CONFIG).get("settings")
    return settings.get("quantize_experts") if isinstance(settings, dict) else None


def tokenizer_of(run: Path) -> Path:
    """The folder with the tokenizer of a run, or of a converted checkpoint, which has it beside its config."""
    places = (run / TOKENIZER, run / EXPORT, run)
    return next((place for place in places if any((place / name).is_file() for name in TOKENIZER_FILES)), run)


def stored_tensors_of(place: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint. Keeps the last two that were read, since a file may need one expert at a time."""
    kept = lru_cache(maxsize=2)(partial(read_tensor, place))

    def leaf(name: str, shape: torch.Size, dtype: torch.dtype) -> LazyTensor:
        return LazyTensor(shape, dtype, lambda box: kept(name, shape, dtype)[box])

    return {name: leaf(name, shape, dtype) for name, (shape, dtype) in stored_tensors(place).items()}
