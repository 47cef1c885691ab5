"""The safetensors files of a checkpoint, in a folder or on the hub, as lazy tensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import CHAT_TEMPLATE_DIR, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from moesaic.checkpoint.folder import is_plain
from moesaic.integrations.transformers.configs import read_values
from moesaic.integrations.transformers.lazy import Box, LazyTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass
class Files:
    """Open files: their tensors by name, and the number of bytes that were read from them so far."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    bytes_read: int = 0

    def leaf(self, file: Any, name: str, place: Path) -> LazyTensor:
        """A tensor of an open file, which lies in ``place``."""
        view = file.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise ValueError(
                f"{place}: '{name}' has the dtype {view.get_dtype()}, which is not one of {', '.join(DTYPES)}"
            )

        def source(box: Box) -> Tensor:
            # A tensor without dims has no slices.
            part = view[box] if box else file.get_tensor(name)
            self.bytes_read += part.nbytes
            return part

        return LazyTensor(view.get_shape(), DTYPES[view.get_dtype()], source)


@contextmanager
def open_files(path: str | Path, revision: str | None = None) -> Iterator[Files]:
    """The tensors of a checkpoint: a folder, or a name on the hub, with one safetensors file or an index of several.

    ``revision`` is a branch, a tag or a commit on the hub. Only headers are read. Names on the hub go through
    transformers' cache. What is in the cache needs no network.

    Raises:
        OSError: there is no such checkpoint, it has no safetensors, or a file is missing.
        ValueError: a file is damaged, or the index and the files have different tensors; the message names them.
    """
    with ExitStack() as stack:
        files = Files()
        places, listed = locate(path, revision)
        for place in places:
            try:
                file = stack.enter_context(safe_open(place, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{place} is damaged: {error}") from error
            for name in file.keys():  # noqa: SIM118, an open file is no dict
                if name in files.tensors:
                    raise ValueError(f"{place}: another file of the checkpoint also has '{name}'")
                files.tensors[name] = files.leaf(file, name, place)
        if listed is not None and (differing := listed ^ files.tensors.keys()):
            raise ValueError(f"{path}: the index and its files do not agree on {sorted(differing)}")
        yield files


def locate(path: str | Path, revision: str | None = None) -> tuple[list[Path], set[str] | None]:
    """The safetensors files of a checkpoint, and the names of all tensors if an index lists them."""
    name = str(path)

    def cached(file: str) -> str | None:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)

    if (single := cached(SAFE_WEIGHTS_NAME)) is not None:
        return [Path(single)], None
    if (index := cached(SAFE_WEIGHTS_INDEX_NAME)) is None:
        raise OSError(f"{name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; save it as safetensors")
    places_of = _read_index(Path(index))
    wanted = sorted(set(places_of.values()))
    if Path(name).is_dir():
        places = [Path(name, file) for file in wanted]
    else:
        places = [Path(str(cached_file(name, file, revision=revision))) for file in wanted]
    return places, set(places_of)


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises ``ValueError`` if the index is damaged or leads out of its folder."""
    values = read_values(index)
    if "weight_map" not in values:
        raise ValueError(f"{index} is damaged: KeyError: 'weight_map'")
    places = values["weight_map"]
    if not isinstance(places, dict):
        raise ValueError(f"{index} is damaged: weight_map must be an object, got {type(places).__name__}")
    for name, file in places.items():
        if not isinstance(file, str) or not is_plain(file):
            raise ValueError(f"{index}: weight_map has {file!r} for '{name}', which is no file in its folder")
    return places


def require_new(source: str | Path, target: Path, name: str) -> None:
    """Raise ``ValueError`` unless the target is a new or empty folder, and not the source. Errors name ``name``."""
    if Path(source).resolve() == target.resolve():
        raise ValueError(f"{name}: {target} is also the source; choose another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{name}: {target} already exists and is not empty; choose another folder")


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy the tokenizer files that a checkpoint has into a folder."""
    for name in TOKENIZER_FILES:
        if (place := cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)) is not None:
            shutil.copy(place, target / name)
    if (templates := Path(source) / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(templates, target / CHAT_TEMPLATE_DIR)
