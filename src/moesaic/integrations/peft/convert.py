"""Convert adapters: between the names of our checkpoints and peft's files, and between the forms that those have.

The model is on the meta device, so this needs memory for the adapters alone.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from moesaic import checkpoint
from moesaic.checkpoint import CheckpointError
from moesaic.checkpoint.lazy import stored_tensors
from moesaic.checkpoint.run_folder import CHECKPOINTS, CONFIG
from moesaic.checkpoint.store import read_into, verify
from moesaic.integrations.peft.add import add_adapters, factors_of
from moesaic.integrations.peft.each_expert import by_each_expert
from moesaic.integrations.peft.files import fill_adapters, in_files, read_config, read_config_alone, save_adapters
from moesaic.integrations.peft.switch import adapters_of, config_of
from moesaic.integrations.transformers.lazy import equal_bits
from moesaic.integrations.transformers.loading import Source, model_on_meta, read_changed_config
from moesaic.integrations.transformers.plain import is_of_adapter
from moesaic.integrations.transformers.run_weights import PREFIX
from moesaic.integrations.transformers.swap import swap_moe

_NAME = "default"


@torch.no_grad()
def adapters_to_dcp(source: Path, target: Path, base: str | None, dtype: torch.dtype | None) -> None:
    """From a folder of peft to a folder as :func:`moesaic.integrations.transformers.convert` writes it.

    Its one checkpoint has the adapters alone, under their names in a model with our layers. ``base`` is the model that
    they are for; None takes the one in their config.

    Raises:
        OSError, ValueError: a file is missing or damaged; there is no model; the adapters do not fit it.
        CheckpointError: what was written differs from the source.
    """
    config = read_config(source)
    of_base = _config_of_base(config, base)
    model = _empty(of_base, config, dtype)
    fill_adapters(model, source, _NAME)
    factors = _factors(model)
    target.mkdir(parents=True, exist_ok=True)
    place = checkpoint.save(target / CHECKPOINTS, 0, {"model": factors}, {"converted_from": source.name})
    (target / CONFIG).write_text(json.dumps({"model": of_base.to_dict()}, indent=2, default=str) + "\n")
    shutil.copy(source / CONFIG_NAME, target / CONFIG_NAME)
    verify(place)
    _compare(factors, _read(place))


@torch.no_grad()
def adapters_of_run(
    place: Path, run: Path, of_base: Any, target: Path, dtype: torch.dtype | None, *, each_expert: bool
) -> None:
    """From a checkpoint with adapters, in the folder of its run, to a folder of peft.

    Args:
        place, run: the checkpoint and the folder.
        of_base: the config of the model.
        target, each_expert: see :func:`save_adapters`.
        dtype: cast to this one; None casts nothing.

    Raises:
        OSError, ValueError: the checkpoint has no adapters, or they are not what the config in the folder says.
        CheckpointError: the checkpoint is damaged, or what was written differs from it.
    """
    verify(place)
    stored = _read(place)
    if not stored:
        raise ValueError(f"source: {place} has no adapters; leave out --to peft to convert its weights")
    model = _empty(of_base, read_config_alone(run), dtype)
    factors = _factors(model)
    if differing := sorted(factors.keys() ^ stored.keys()):
        raise ValueError(f"source: the adapters in {place} are not those of {run / CONFIG_NAME}: {differing}")
    for name, factor in factors.items():
        if factor.shape != stored[name].shape:
            raise ValueError(
                f"source: '{name}' in {place} is {list(stored[name].shape)}, and {list(factor.shape)} by the config"
            )
        factor.copy_(stored[name])
    _save(model, target, each_expert=each_expert)


@torch.no_grad()
def adapters_to_peft(
    source: Path, target: Path, base: str | None, dtype: torch.dtype | None, *, each_expert: bool
) -> None:
    """From a folder of peft to another one: names of every expert or not, another dtype.

    Raises:
        OSError, ValueError: see :func:`adapters_to_dcp`.
        CheckpointError: what was written differs from the source.
    """
    config = read_config(source)
    model = _empty(_config_of_base(config, base), config, dtype)
    fill_adapters(model, source, _NAME)
    _save(model, target, each_expert=each_expert)


def _config_of_base(config: Any, base: str | None) -> Any:
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError("--base: the config of these adapters names no model; give the folder or the name of it")
    try:
        return read_changed_config(Source(name))
    except OSError as error:
        raise OSError(
            f"--base: the model {name} of these adapters cannot be read: {error}; give another one"
        ) from error


def _empty(of_base: Any, config: Any, dtype: torch.dtype | None) -> Any:
    """A model on the meta device whose adapters have memory."""
    # A new model changes its config.
    model = add_adapters(swap_moe(model_on_meta(copy.deepcopy(of_base))), config, _NAME)
    for name, factor in _factors(model).items():
        path, _, leaf = name.rpartition(".")
        empty = torch.empty(factor.shape, dtype=dtype or factor.dtype)
        setattr(model.get_submodule(path), leaf, nn.Parameter(empty))
    return model


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if is_of_adapter(name)}


def _save(model: Any, target: Path, *, each_expert: bool) -> None:
    save_adapters(model, target, _NAME, each_expert=each_expert)
    targets = adapters_of(model, _NAME)
    form = by_each_expert(model, targets, config_of(model, _NAME))[0] if each_expert else in_files
    meant = [form(t, {n: p.detach() for n, p in factors_of(model, t, _NAME)}) for t in targets]
    _compare({k: t for pairs in meant for k, t in pairs}, load_file(target / SAFETENSORS_WEIGHTS_NAME))


def _read(place: Path) -> dict[str, Tensor]:
    """The adapters in a checkpoint, and nothing else of it."""
    found = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in stored_tensors(place).items()
        if name.startswith(PREFIX) and is_of_adapter(name)
    }
    if found:
        read_into(place, found, alone=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def _compare(meant: dict[str, Tensor], written: dict[str, Tensor]) -> None:
    for name in sorted(meant.keys() | written.keys()):
        if name not in meant or name not in written or not equal_bits(meant[name], written[name]):
            raise CheckpointError(f"verification: '{name}' differs from the source")
