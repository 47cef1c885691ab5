"""Convert checkpoints of transformers to those of :mod:`moesaic.checkpoint`, and back; and adapters of peft.

A converted checkpoint has weights and no optimizer state. ``moesaic.checkpoint.load`` reads it, but
``moesaic train --resume`` does not.

Tensors are converted one by one. This needs memory for twice the experts of the largest layer and one file of the
result. Both ways end with a verification. It reads what was written and compares every tensor with its source, bit for
bit.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic import checkpoint
from moesaic.checkpoint import CheckpointError
from moesaic.checkpoint.folder import MANIFEST
from moesaic.checkpoint.lazy import LazyPlanner
from moesaic.checkpoint.run_folder import ADAPTER_CONFIG, CHECKPOINTS, CONFIG
from moesaic.checkpoint.store import verify
from moesaic.integrations.transformers import ties
from moesaic.integrations.transformers.configs import damage_is_value_error
from moesaic.integrations.transformers.files import (
    Files,
    copy_tokenizer,
    open_files,
    require_new,
)
from moesaic.integrations.transformers.lazy import LazyTensor, equal_bits
from moesaic.integrations.transformers.loading import (
    Source,
    empty_model,
    empty_model_and_tensors,
    model_on_meta,
    part_with_peft,
    to_our_names,
)
from moesaic.integrations.transformers.naming import to_model_names, twins
from moesaic.integrations.transformers.progress import Progress
from moesaic.integrations.transformers.run_weights import (
    PREFIX,
    checkpoint_and_run,
    config_of,
    refuse_adapters,
    stored_tensors_of,
    tokenizer_of,
)
from moesaic.integrations.transformers.saving import cast_like, to_file_names, to_original_names, write_pretrained
from moesaic.integrations.transformers.swap import swap_moe

Format = Literal["dcp", "hf", "peft"]
_OTHER: dict[Format, Format] = {"dcp": "hf", "hf": "dcp", "peft": "dcp"}


def format_of(path: str | Path) -> Format:
    """The format of a checkpoint: ``"dcp"`` for a run folder or one of its checkpoints, ``"peft"`` for a folder of
    adapters, else ``"hf"``.
    """
    place = Path(path)
    if (place / MANIFEST).is_file() or checkpoint.checkpoints(place / CHECKPOINTS):
        return "dcp"
    return "peft" if (place / ADAPTER_CONFIG).is_file() else "hf"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Format | None = None,
    dtype: torch.dtype | None = None,
    ignore_unexpected: bool = False,
    adapter: str | Path | None = None,
    base: str | None = None,
    each_expert: bool = False,
    progress: Progress | None = None,
) -> Format:
    """Convert a checkpoint to another format, or change one of transformers; verify the result, return its format.

    Args:
        source: a checkpoint of transformers (a folder or a name on the hub), a run folder of ``moesaic train``, or one
            checkpoint in it; or a folder of adapters of peft. From a run folder the newest checkpoint is taken.
        target: the folder to write. For ``"dcp"`` it is like a run folder, with a config and one checkpoint of step 0.
        to: the format of the result. None takes the other one of ``"dcp"`` and ``"hf"``, and ``"dcp"`` for adapters.
            ``"hf"`` for a checkpoint of transformers casts it, or adds adapters to it. ``"peft"`` takes the adapters of
            a run, or writes those of a folder again in another form.
        dtype: cast tensors to this dtype, except those that transformers keeps in fp32. None casts nothing.
        ignore_unexpected: leave out what the model does not have; see :func:`load_pretrained`. For a checkpoint of
            transformers only.
        adapter: a folder of adapters to add to the weights of a checkpoint of transformers.
        base: for adapters, the model that they belong to; None takes the one that their config names. Its config alone
            is read.
        each_expert: write adapters with a pair of tensors for each expert; see
            :func:`moesaic.integrations.peft.save_adapters`.
        progress: is called while the work goes on.

    Raises:
        OSError, ValueError: the source is incomplete, or its model cannot be swapped; or it has the format ``to``
            already, and there is nothing to change; or the target has other files or cannot be written; or an option
            does not go with the formats.
        CheckpointError: the source is damaged, or what was written differs from it.

    After an error nothing stays in the target.
    """
    own = format_of(source)
    to = to or ("hf" if adapter is not None else _OTHER[own])
    if own == to == "hf" and dtype is None and adapter is None:
        raise ValueError(f"--to hf: {source} already has this format; give --dtype to cast it, or --adapter")
    _check_formats(source, own, to)
    _check_options(own, to, adapter, base, each_expert=each_expert)
    require_new(source, Path(target), "target")
    progress = progress or Progress()
    try:
        if "peft" in (own, to):
            _convert_adapters(Path(source), own, Path(target), to, dtype, base, each_expert=each_expert)
        elif own == "dcp":
            _to_hf(Path(source), Path(target), dtype, progress)
        else:
            described = Source(source, dtype, ignore_unexpected=ignore_unexpected)
            if to == "dcp":
                _to_dcp(described, Path(target), progress)
            else:
                _change_hf(described, Path(target), progress, adapter)
        return to
    except BaseException:
        # The target was new or empty. Leave nothing there, so that another try can write to it.
        shutil.rmtree(target, ignore_errors=True)
        raise


def _check_formats(source: str | Path, own: Format, to: Format) -> None:
    if own == "peft" and to == "hf":
        raise ValueError(
            f"--to hf: {source} has adapters and no weights; give the model in its place, and --adapter {source}"
        )
    if own == "hf" and to == "peft":
        raise ValueError(f"--to peft: {source} has weights and no adapters; leave it out")
    if own == to == "dcp":
        raise ValueError(f"--to dcp: {source} already has this format; leave out --to")


def _check_options(own: Format, to: Format, adapter: Any, base: str | None, *, each_expert: bool) -> None:
    if adapter is not None and (own, to) != ("hf", "hf"):
        raise ValueError(
            f"--adapter: adapters are added to a transformers checkpoint, and the result is one; this is {own} to {to}"
        )
    if base is not None and own != "peft":
        raise ValueError("--base: names the model of adapters; leave it out, for SRC is no folder of adapters")
    if each_expert and to != "peft":
        raise ValueError(f"--each-expert: is a form of adapters; add --to peft, this writes {to}")


def _convert_adapters(
    source: Path,
    own: Format,
    target: Path,
    to: Format,
    dtype: torch.dtype | None,
    base: str | None,
    *,
    each_expert: bool,
) -> None:
    adapters = part_with_peft("convert")
    if own == "dcp":
        place, run = checkpoint_and_run(source)
        adapters.adapters_of_run(place, run, config_of(run), target, dtype, each_expert=each_expert)
    elif to == "dcp":
        adapters.adapters_to_dcp(source, target, base, dtype)
    else:
        adapters.adapters_to_peft(source, target, base, dtype, each_expert=each_expert)


def _to_dcp(source: Source, target: Path, progress: Progress) -> None:
    with open_files(source.path) as files:
        plain, tensors = empty_model_and_tensors(source, files)
        with damage_is_value_error(source.path):
            state = to_model_names(plain, tensors, ignore_unexpected=source.ignore_unexpected)
        ties.untie(plain, ties.differing(plain, state))
        # Whoever loads the checkpoint into a model asks for all names of the model.
        state = ties.with_copies(plain, state)
        model = swap_moe(plain)
        tensors = to_our_names(model, state)
        if source.dtype is not None:
            tensors = cast_like(tensors, model)
        ours = {PREFIX + name: tensor for name, tensor in tensors.items()}
        target.mkdir(parents=True, exist_ok=True)
        told = progress.watch("writing", ours)
        place = checkpoint.save(
            target / CHECKPOINTS,
            0,
            {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in ours.items()},
            {"converted_from": Path(source.path).name},
            planner=LazyPlanner({name: partial(_read, tensor) for name, tensor in told.items()}),
        )
        (target / CONFIG).write_text(json.dumps({"model": model.config.to_dict()}, indent=2, default=str) + "\n")
        copy_tokenizer(source.path, target)
        verify(place)
        _compare(stored_tensors_of(place), progress.watch("verifying", ours))


def _change_hf(source: Source, target: Path, progress: Progress, adapter: str | Path | None) -> None:
    with cast_and_merged(source, adapter) as (plain, meant):
        tensors = to_file_names(plain, meant)
        add = partial(copy_tokenizer, source.path)
        write_pretrained(plain, progress.watch("writing", tensors), target, add=add)
        with open_files(target) as written:
            _compare(_named_as(meant, plain, target, written), progress.watch("verifying", meant))


@contextmanager
def cast_and_merged(source: Source, adapter: str | Path | None = None) -> Iterator[tuple[Any, dict[str, LazyTensor]]]:
    """A model of transformers on the meta device, and its tensors, while the files are open.

    Args:
        source: the checkpoint. Tensors are cast to its dtype.
        adapter: a folder of adapters, which are added to the weights; None for none.
    """
    with ExitStack() as stack:
        files = stack.enter_context(open_files(source.path))
        plain, tensors = empty_model_and_tensors(source, files)
        plain.config.architectures = [type(plain).__name__]
        with damage_is_value_error(source.path):
            state = to_model_names(plain, tensors, ignore_unexpected=source.ignore_unexpected)
        if adapter is not None:
            state = stack.enter_context(part_with_peft("merged").merged_state(plain, state, adapter))
        yield plain, cast_like(state, plain)


def _to_hf(source: Path, target: Path, dtype: torch.dtype | None, progress: Progress) -> None:
    place, run = checkpoint_and_run(source)
    verify(place)
    config = config_of(run)
    stored = {n.removeprefix(PREFIX): t for n, t in stored_tensors_of(place).items() if n.startswith(PREFIX)}
    refuse_adapters(stored, place, ", or --to peft to get them alone")
    own = next((tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point), torch.float32)
    with damage_is_value_error(run / CONFIG, vars(config)):
        plain = model_on_meta(config, dtype or own)
        plain.config.architectures = [type(plain).__name__]
        swapped = swap_moe(model_on_meta(copy.deepcopy(config), own))
        meant = to_original_names(swapped, stored, restore_dtypes=False)
        if dtype is not None:
            meant = cast_like(meant, plain)
        tensors = to_file_names(plain, meant)
    write_pretrained(plain, progress.watch("writing", tensors), target, add=partial(copy_tokenizer, tokenizer_of(run)))
    with open_files(target) as files:
        _compare(_named_as(meant, plain, target, files), progress.watch("verifying", meant))


def _named_as(meant: Mapping[str, LazyTensor], plain: Any, target: Path, files: Files) -> dict[str, LazyTensor]:
    """What was written, under the names that the source has. So a tensor that the target lacks is seen too."""
    try:
        written = to_model_names(empty_model(Source(target), files), files.tensors)
    except ValueError as error:
        raise CheckpointError(f"verification: {error}") from error
    tied = {name: {name} | twins(plain, name) for name in {*meant, *written}}
    named = {name: tensor for name, tensor in written.items() if not tied[name] & meant.keys()}
    for name in meant:
        if (found := next((n for n in (name, *tied[name]) if n in written), None)) is not None:
            named[name] = written[found]
    return named


def _compare(written: Mapping[str, LazyTensor], meant: Mapping[str, LazyTensor]) -> None:
    if differing := written.keys() ^ meant.keys():
        raise CheckpointError(f"verification: only one of source and target has the tensors {sorted(differing)}")
    for name, tensor in meant.items():
        mine, theirs = written[name].read(), tensor.read()
        if not equal_bits(mine, theirs):
            raise CheckpointError(f"verification: '{name}' differs from the source")


def _read(tensor: LazyTensor) -> Tensor:
    return tensor.read().contiguous()
