"""Write sharded models as checkpoints of transformers, on all ranks together.

The tensors of the files have transformers' names and layouts. Each rank writes an equal part of them. They are gathered
one at a time, and written as they come. So a rank holds its own shards and one tensor.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from moesaic import ranks
from moesaic.checkpoint.exchange import publish, recover
from moesaic.checkpoint.sealed import flush_all
from moesaic.integrations.transformers import ties
from moesaic.integrations.transformers.configs import damage_is_value_error
from moesaic.integrations.transformers.exchange import Exchange
from moesaic.integrations.transformers.export import check_not_quantised, origins_of
from moesaic.integrations.transformers.files import TOKENIZER_FILES
from moesaic.integrations.transformers.lazy import LazyTensor
from moesaic.integrations.transformers.loading import model_on_meta
from moesaic.integrations.transformers.plain import name_without_wrappers, plain_on_meta
from moesaic.integrations.transformers.shard_file import ShardFile
from moesaic.parallel.split import whole_of

_OURS = {CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *TOKENIZER_FILES}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_TEMPLATES = "additional_chat_templates"
_ADAPTER_CONFIG = "adapter_config.json"


@torch.no_grad()
def export_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model, parallelized or not, as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Collective: every rank calls it and writes its part. Names and layouts are those of transformers' own
    ``save_pretrained``. When all files are written and flushed, one rename gives the folder its name, and replaces an
    earlier export. So a crash never leaves half a checkpoint under that name. All ranks must see the same file system.

    Args:
        model: a model with layers that :func:`swap_moe` made, or its stages in a pipeline. Classifiers, bare models and
            classes of your own are written under their own class names, as ``save_pretrained`` does.
        path: the folder to write. It may hold an earlier export.
        tokenizer: a tokenizer to save in the same folder.
        max_shard_size: the most bytes that a file may have. A file of a single tensor may have more.
        dtype: cast tensors to this dtype, but for those that transformers keeps in fp32. For causal language models.
            None casts nothing.
        add: writes more files into the folder, on rank 0, before the folder gets its name.

    Raises:
        ValueError: the model has adapters that were not merged, a MoE that ``swap_moe`` did not make, or quantised
            experts, or ``path`` has other files. All ranks raise it, before anything is written.
        OSError: a rank could not write. All ranks raise it. What was under ``path`` before is still there.

    Example:
        >>> export_pretrained(model, "out")
        >>> AutoModelForCausalLM.from_pretrained("out")
    """
    check_not_quantised(model)
    exchange = Exchange()
    # Of stages all ranks know the whole model, without its numbers.
    whole = whole_of(model)
    plain = plain_on_meta(whole)
    state = {name_without_wrappers(name): tensor for name, tensor in whole.state_dict(keep_vars=True).items()}
    ties.tie_what_is_one(plain, state)
    leaves = exchange.of_model(model)
    original = to_original_names(whole, {name: leaves[id(t)] for name, t in state.items()})
    if dtype is not None:
        plain.config.dtype = dtype
        original = cast_like(original, model_on_meta(copy.deepcopy(plain.config), dtype))
    tensors = to_file_names(plain, original)

    def add_all(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        add(folder)

    write_pretrained(plain, tensors, path, max_shard_size=max_shard_size, exchange=exchange, add=add_all)


def write_pretrained(
    plain: Any,
    tensors: Mapping[str, LazyTensor],
    path: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    exchange: Exchange | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the tensors of a model's files as :func:`export_pretrained` does, with its config. Collective.

    Args:
        plain: a model of transformers, on any device.
        tensors: from :func:`to_file_names`, the same on all ranks.
        path, max_shard_size: see :func:`export_pretrained`.
        exchange: the one that made the tensors, if they are spread over ranks.
        add: writes more files into the folder, on rank 0, before the folder gets its name.
    """
    final = Path(path).resolve()
    own: Path | None = None
    try:
        own = ranks.on_leader(lambda: _begin(final))
        work = own / "new"
        ranks.together(lambda: _check_shared(work))
        names = deal(tensors, ranks.world_size(), max_shard_size)
        failure = _write_shards(tensors, names, work, exchange or Exchange())
        ranks.share_failure(failure)
        ranks.on_leader(lambda: _finish(plain, tensors, names, work, final, add))
    finally:
        if ranks.is_leader() and own is not None:
            shutil.rmtree(own, ignore_errors=True)


def to_original_names(
    model: nn.Module, ours: Mapping[str, LazyTensor], *, restore_dtypes: bool = True
) -> dict[str, LazyTensor]:
    """The state of the model before the swap, from the state of the model with swapped layers.

    The layer keeps a router's bias in fp32, whatever dtype it had in the model. ``restore_dtypes`` casts it back.
    """
    state = dict(ours)
    for prefix, origin in origins_of(model).items():
        theirs = origin.block.state_dict()
        for link in origin.links:
            tensor: Any = link.join(*(state.pop(prefix + name) for name in link.ours))  # type: ignore[arg-type]
            if isinstance(tensor, Tensor):
                tensor = LazyTensor(tensor.shape, tensor.dtype, tensor.__getitem__)
            is_changed = link.is_bias and restore_dtypes
            state[prefix + link.theirs] = tensor.to(theirs[link.theirs].dtype) if is_changed else tensor
    return state


def cast_like(tensors: Mapping[str, LazyTensor], model: nn.Module) -> dict[str, LazyTensor]:
    """Cast tensors to the dtypes that they have in a model. transformers keeps some of them in fp32 in any model."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}


def to_file_names(plain: Any, state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of the files for a whole state of a transformers model. It reverses transformers' conversions.

    Collective. Weights that are tied by the config and have the same numbers are written once. Those with other numbers
    are kept, and the config of ``plain`` no longer ties them.

    Raises:
        ValueError: the state and the model have different names; the message lists them.
    """
    # Every rank takes part in reading, but only rank 0 sees the numbers.
    ties.untie(plain, ranks.from_leader(ties.differing(plain, state)))
    state = ties.without_copies(plain, state)
    wanted = plain.state_dict()
    tied = plain.all_tied_weights_keys
    missing = [name for name in wanted if name not in state and name not in tied]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        raise ValueError(f"cannot export: missing tensors {missing}, unknown tensors {unexpected}")
    left_out = set(plain._keys_to_ignore_on_save or ())
    kept: dict[str, Any] = {name: tensor for name, tensor in state.items() if name not in left_out}
    return revert_weight_conversion(plain, kept)  # type: ignore[return-value]


def deal(tensors: Mapping[str, LazyTensor], num_ranks: int, max_bytes: int) -> list[list[list[str]]]:
    """For each rank its files, and for each file its tensors. The shares of two ranks differ by one tensor at most.

    Tensors that follow each other stay together. A rank may get no file, but there is at least one file.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    dealt: list[list[list[str]]] = [[] for _ in range(num_ranks)]
    done = 0
    sizes = [0] * num_ranks
    for name, tensor in tensors.items():
        rank = min((2 * done + tensor.nbytes) * num_ranks // (2 * total), num_ranks - 1) if total else 0
        if not dealt[rank] or sizes[rank] + tensor.nbytes > max_bytes:
            dealt[rank].append([])
            sizes[rank] = 0
        dealt[rank][-1].append(name)
        sizes[rank] += tensor.nbytes
        done += tensor.nbytes
    return dealt


def _write_shards(
    tensors: Mapping[str, LazyTensor], names: list[list[list[str]]], work: Path, exchange: Exchange
) -> Exception | None:
    """Gather every tensor on its rank and write it. A rank that fails still sends its parts to the others."""
    numbers = _numbered(names)
    turns = [[(i, name) for i, file in enumerate(files) for name in file] for files in names]
    shard: ShardFile | None = None
    failure: Exception | None = None
    # The ranks take turns, so that all of them write their files at about the same time.
    for turn in range(max(map(len, turns))):
        for rank, own in enumerate(turns):
            if turn >= len(own):
                continue
            file, name = own[turn]
            exchange.receiver = rank
            tensor = tensors[name].read()
            if rank != ranks.rank() or failure is not None:
                continue
            in_file = names[rank][file]
            try:
                if shard is None:
                    shard = ShardFile(work / numbers[rank, file], {name: tensors[name] for name in in_file})
                shard.write(name, tensor)
                if name == in_file[-1]:
                    shard.close()
                    shard = None
            except (OSError, ValueError) as error:
                failure = error
    return failure


def _numbered(names: list[list[list[str]]]) -> dict[tuple[int, int], str]:
    """The name of each file, by rank and number."""
    places = [(rank, file) for rank, files in enumerate(names) for file in range(len(files))]
    if len(places) == 1:
        return {places[0]: SAFE_WEIGHTS_NAME}
    stem, suffix = SAFE_WEIGHTS_NAME.split(".")
    return {place: f"{stem}-{i:05d}-of-{len(places):05d}.{suffix}" for i, place in enumerate(places, start=1)}


def _begin(final: Path) -> Path:
    """Check the target. Make a folder beside it for this call alone, and in that the folder ``new`` to write to."""
    recover_export(final)
    if final.exists():
        if not final.is_dir():
            raise OSError(f"path: {final} is a file; give a folder")
        entries = list(final.iterdir())
        if other := sorted(entry.name for entry in entries if not _is_ours(entry)):
            raise ValueError(f"path: {final} has {other}, which no export wrote; choose another folder")
        if entries and not (final / CONFIG_NAME).is_file():
            raise ValueError(f"path: {final} has no {CONFIG_NAME}, so no export wrote it; choose another folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    # Only its user may read the folder of mkdtemp. The one that gets the name has the permissions of the umask.
    (own / "new").mkdir()
    return own


def recover_export(final: Path) -> None:
    """Bring back an export that a crash has left without its name, while it was replaced."""
    recover(final, lambda old: (old / CONFIG_NAME).is_file())


def _is_ours(entry: Path) -> bool:
    if entry.is_dir():
        # A folder of peft holds what the run's adapters were before they were merged.
        return entry.name == _TEMPLATES or (entry / _ADAPTER_CONFIG).is_file()
    return entry.name in _OURS or _SHARD.fullmatch(entry.name) is not None


def _check_shared(work: Path) -> None:
    if not work.is_dir():
        raise OSError(f"rank {ranks.rank()} does not see {work}; all ranks need one shared file system")


def _finish(
    plain: Any,
    tensors: Mapping[str, LazyTensor],
    names: Sequence[Sequence[Sequence[str]]],
    work: Path,
    final: Path,
    add: Callable[[Path], None],
) -> None:
    """Write the small files, and give the folder its name."""
    numbers = _numbered([[list(file) for file in files] for files in names])
    if len(numbers) > 1:
        index = {
            "metadata": {
                "total_parameters": plain.num_parameters(),
                "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            },
            "weight_map": {name: place for (rank, file), place in numbers.items() for name in names[rank][file]},
        }
        (work / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    # Both check their values once more.
    with damage_is_value_error(CONFIG_NAME, vars(plain.config)):
        plain.config.save_pretrained(work)
    if plain.can_generate():
        with damage_is_value_error(GENERATION_CONFIG_NAME):
            plain.generation_config.save_pretrained(work)
    add(work)
    flush_all(work)
    publish(work, final)
