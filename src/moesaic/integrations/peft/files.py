"""Adapters in peft's files, ``adapter_config.json`` and ``adapter_model.safetensors``, whatever layout the model has.

Of every tensor each rank reads its part. Tensors are gathered and written one by one.

Legend: E experts, r rank, I and O the dims that peft takes for those that a weight comes from and goes to.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moesaic import ranks
from moesaic.integrations.peft.add import add_adapters, factors_of
from moesaic.integrations.peft.each_expert import Form, by_each_expert
from moesaic.integrations.peft.switch import adapters_of, config_of, configs_of, set_adapter
from moesaic.integrations.peft.targets import Target
from moesaic.integrations.transformers.exchange import Exchange
from moesaic.integrations.transformers.files import DTYPES, Files
from moesaic.integrations.transformers.lazy import Box, LazyTensor, whole
from moesaic.integrations.transformers.plain import plain_on_meta
from moesaic.parallel.split import whole_of
from moesaic.sharding.parts import local_part

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@torch.no_grad()
def save_adapters(model: nn.Module, path: str | Path, name: str = "default", *, each_expert: bool = False) -> None:
    """Write the adapters of one name as a folder that ``peft.PeftModel.from_pretrained`` loads around the plain model.

    Collective on a parallelized model, and over all stages of a pipeline. Names and layouts are those of peft for the
    model before the swap. Rank 0 writes, and has one tensor whole at a time. Files that are there already are replaced,
    each at once. With ``target_parameters`` the config that is written has no ``lora_dropout``, for peft would not load
    it.

    Args:
        model: with adapters from :func:`add_adapters`; or its stages.
        path: the folder.
        name: which adapters.
        each_expert: write a pair of tensors for each expert, under the names that experts have in the files of the
            model, for programs that expect those.

    Raises:
        ValueError: there are no adapters of this name; or ``each_expert`` for a model whose files have no such names.
        OSError: the folder cannot be written. All ranks raise it.

    Example:
        >>> save_adapters(model, "out/adapter")
        >>> peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("path/to/model"), "out/adapter")
    """
    exchange, folder, whole_model = Exchange(), Path(path), whole_of(model)
    targets = adapters_of(model, name)
    form, config = in_files, config_of(model, name)
    if each_expert:
        form, config = by_each_expert(whole_model, targets, config)
    leaves = exchange.of_model(model)
    shapes = {key: (shape, dtype) for target in targets for key, shape, dtype in _described(model, target, name, form)}

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        saved = copy.copy(config)
        saved.inference_mode = True
        if saved.target_parameters:
            # Of these peft loads no adapter whose config has one.
            saved.lora_dropout = 0.0
        saved.save_pretrained(str(folder))

    ranks.on_leader(begin)
    unfinished = folder / f".{SAFETENSORS_WEIGHTS_NAME}.unfinished"
    failure: Exception | None = None
    writer = None
    try:
        writer = open(unfinished, "wb") if ranks.is_leader() else None  # noqa: SIM115, closed below
        if writer is not None:
            writer.write(_header(shapes))
    except OSError as error:
        failure = error
    for target in targets:
        # A rank that failed still sends its parts to the others.
        for _, tensor in form(target, {n: leaves[id(p)].read() for n, p in factors_of(whole_model, target, name)}):
            if writer is not None and failure is None:
                try:
                    writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                except OSError as error:
                    failure = error
    try:
        if writer is not None:
            writer.flush()
            os.fsync(writer.fileno())
            writer.close()
    except OSError as error:
        failure = failure or error
    ranks.share_failure(failure)
    ranks.on_leader(lambda: os.replace(unfinished, folder / SAFETENSORS_WEIGHTS_NAME))


@torch.no_grad()
def load_adapters(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Read adapters that peft or :func:`save_adapters` has written, and make them the active ones.

    If the model has no adapters of this name, they are added as the folder's config says, which has to be before
    :func:`moesaic.parallelize`. If it has some, their numbers are replaced, in any layout, and each rank reads its
    part. Files that name every expert (of transformers 4) are converted by peft, which reads them whole. To go on
    training with a dropout, call :func:`add_adapters` with a config that has it, and then this.

    Args:
        model: a transformers model with our layers; or its stages, which have the adapters already.
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: of these adapters.

    Raises:
        OSError: there is no such folder, or a file is missing.
        ValueError: a file is damaged; or the files do not fit the model, and the message lists missing and unexpected
            names and wrong shapes. All ranks raise it, before any number is read.

    Example:
        >>> model = swap_moe(AutoModelForCausalLM.from_pretrained("path/to/model"))
        >>> load_adapters(model, "path/to/adapter")
        >>> model = parallelize(model, meshes)
    """

    def add() -> None:
        config = read_config(path)
        if name not in configs_of(model):
            add_adapters(model, config, name)

    ranks.together(add)
    fill_adapters(model, path, name)
    set_adapter(model, name)


def read_config(path: str | Path) -> Any:
    """The config of saved adapters, which have to be there too.

    Raises:
        OSError: there is no such folder, or a file is missing.
        ValueError: the config is damaged.
    """
    config = read_config_alone(path)
    if not (file := Path(path) / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise OSError(f"path: there is no {file}")
    return config


def read_config_alone(path: str | Path) -> Any:
    """The config in a folder. Raises as :func:`read_config` does."""
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise OSError(f"path: there is no {file}")
    try:
        return peft.PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


@torch.no_grad()
def fill_adapters(model: nn.Module, path: str | Path, name: str) -> None:
    """Read the numbers of adapters that the model has. Each rank reads its part."""

    def read() -> None:
        with stored_factors(model, path, name) as stored:
            for target in adapters_of(model, name):
                tensors = _of_ours(target, *(stored[f"{target.key}.lora_{letter}.weight"] for letter in "AB"))
                for factor, parameter in factors_of(model, target, name):
                    local, box = local_part(parameter)
                    tensors[factor].read_into(local, box)

    ranks.together(read)


@contextmanager
def stored_factors(model: nn.Module, path: str | Path, name: str) -> Iterator[dict[str, LazyTensor]]:
    """The tensors in the files of adapters that the model has, under today's names, while the file is open.

    Raises:
        ValueError: the file is damaged, or does not fit the adapters.
    """
    place = Path(path) / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(place, framework="pt") as file:
            files = Files()
            # peft's file has a key for each tensor.
            stored = {key: files.leaf(file, key, place) for key in file.keys()}  # noqa: SIM118, a file is no dict
            targets = adapters_of(model, name)
            wanted = {k: shape for target in targets for k, shape, _ in _described(model, target, name)}
            if stored.keys() != wanted.keys():
                stored = _converted(model, stored, config_of(model, name))
            _check(place, stored, wanted)
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{place} is damaged: {error}") from error


def _described(
    model: nn.Module, target: Target, name: str, form: Form | None = None
) -> list[tuple[str, list[int], torch.dtype]]:
    """The keys of a target's tensors in files, and their shapes and dtypes."""
    whole = whole_of(model)
    empty = {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in factors_of(whole, target, name)}
    return [(key, list(t.shape), t.dtype) for key, t in (form or in_files)(target, empty)]


def in_files(target: Target, factors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The two tensors that peft has for a target."""
    if target.link is None:
        a, b = (factors[name] for name in (("a", "b") if target.is_router else ("lora_a", "lora_b")))
    else:
        # Of one weight of the block, w1 and w3 share the factor that is not cut.
        inner = factors[f"{target.weights[0]}_a"]
        outer = target.link.join(*(factors[f"{weight}_b"] for weight in target.weights))
        left, right = (outer, inner.mT) if _transposes(target) else (inner, outer)
        a_EIr, b_ErO = (right.mT, left.mT) if target.swapped else (left, right)
        r = target.rank.r
        a = a_EIr.mT.reshape(target.experts * r, -1)
        b = b_ErO.permute(2, 1, 0).reshape(-1, r * target.experts)
    return [(f"{target.key}.lora_A.weight", a), (f"{target.key}.lora_B.weight", b)]


def _of_ours(target: Target, a: LazyTensor, b: LazyTensor) -> dict[str, LazyTensor]:
    """Our factors, from the two tensors of a target. The weight of the block is ``left right``."""
    if target.link is None:
        names = ("a", "b") if target.is_router else ("lora_a", "lora_b")
        return dict(zip(names, (a, b), strict=True))
    left, right = factors_by_expert(a, b, target)
    inner, outer = (right.mT, left) if _transposes(target) else (left, right)
    split: Any = target.link.split
    factors = {f"{weight}_b": part for weight, part in zip(target.weights, split(outer), strict=True)}
    return {f"{target.weights[0]}_a": inner} | factors


def _transposes(target: Target) -> bool:
    """Whether the block has the transpose of our weights."""
    assert target.link is not None
    return target.link.split(torch.empty(1, 2, 4, device="meta"))[0].shape[1] == 4


def factors_by_expert(a: LazyTensor, b: LazyTensor, target: Target) -> tuple[LazyTensor, LazyTensor]:
    """Two tensors of each expert whose product has the layout of the block's weight.

    In files experts come first in the rows of a, and last in the columns of b.
    """
    E, r = target.experts, target.rank.r

    def rows(box: Box) -> Tensor:
        experts, of_rank, inner = box
        read = a.read((slice(experts.start * r, experts.stop * r), inner))
        return read.unflatten(0, (-1, r))[:, of_rank]

    def columns(box: Box) -> Tensor:
        experts, outer, of_rank = box
        # One box for each number of the rank, so that no other expert is read.
        firsts = range(of_rank.start * E, of_rank.stop * E, E)
        read = [b.read((outer, slice(first + experts.start, first + experts.stop))) for first in firsts]
        return torch.stack(read, -1).transpose(0, 1)

    a_ErI = LazyTensor([E, r, a.shape[1]], a.dtype, rows)
    b_EOr = LazyTensor([E, b.shape[0], r], b.dtype, columns)
    return (b_EOr, a_ErI) if target.swapped else (a_ErI.mT, b_EOr.mT)


def _converted(model: nn.Module, stored: Mapping[str, LazyTensor], config: Any) -> dict[str, LazyTensor]:
    """The tensors under today's names, if they have those of an older version of transformers."""
    tensors = {key: tensor.read(whole(tensor.shape)) for key, tensor in stored.items()}
    plain = plain_on_meta(whole_of(model), without_adapters=True)
    found = convert_peft_adapter_state_dict_for_transformers(plain, config, tensors, "default")
    return {key: LazyTensor(t.shape, t.dtype, t.__getitem__) for key, t in found.items()}


def _check(place: Path, stored: Mapping[str, LazyTensor], wanted: Mapping[str, list[int]]) -> None:
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    shapes = [
        f"{key}: {list(stored[key].shape)} instead of {shape}"
        for key, shape in wanted.items()
        if key in stored and list(stored[key].shape) != shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{place} does not fit the model: missing {missing}, unexpected {unexpected}, other shapes {shapes}"
        )


def _header(shapes: Mapping[str, tuple[list[int], torch.dtype]]) -> bytes:
    """What a file of safetensors begins with."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, (shape, dtype) in shapes.items():
        end = at + torch.Size(shape).numel() * dtype.itemsize
        entries[key] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
