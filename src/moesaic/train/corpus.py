"""Text as documents, each of which is either for training or held out.

A document is held out by a hash of its key (its path within the corpus), so the choice is the same on every machine
and does not move when other documents come or go. Of documents with the same text only the first counts: what is
held out is never trained on.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.train.errors import UserError

HELD_OUT_PART = 0.05
# Without tests, which would be most of it, and without what was written by a program.
_STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
_TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# A corpus of fewer documents is cut into pieces of this many characters, so that some of it can be held out.
_FEW_DOCUMENTS = 40
_PIECE = 16_384


@dataclass(frozen=True)
class Document:
    """One text and the key that names it within its corpus."""

    key: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether this document is for measuring and not for training."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_PART * 2**64


def documents(source: str, text_column: str = "text") -> list[Document]:
    """The documents of `source`, in a fixed order, no two with the same text.

    `source` is "stdlib", a folder of text files, a text file, or a dataset that the `datasets` library can load
    (.jsonl, .json, .csv, .parquet, a folder of `save_to_disk`, or a name). Raises `UserError` if there is no text.
    """
    path = Path(source).expanduser()
    if source == "stdlib":
        found = _stdlib()
    elif path.is_file():
        kind = _TABLE_FORMATS.get(path.suffix)
        found = _dataset(source, text_column, kind) if kind else _text_file(path)
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        found = _dataset(source, text_column)
    elif path.is_dir():
        found = _files(path)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        found = _dataset(source, text_column)
    else:
        raise UserError(f"--data {source}: there is no such file or folder")

    unique: dict[bytes, Document] = {}
    for document in found:
        if document.text:
            unique.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    result = list(unique.values())
    if len(result) < _FEW_DOCUMENTS:
        # Pieces may be equal where the whole was not.
        pieces = (piece for document in result for piece in _pieces(document))
        result = list({piece.text: piece for piece in pieces}.values())
    parts = {document.held_out for document in result}
    if parts != {True, False}:
        raise UserError(
            f"--data {source}: {len(result)} piece(s) of text are too few to train on some and hold out others; "
            "give it more text"
        )
    return result


def fingerprint(corpus: list[Document]) -> str:
    """A hash of every key and text: two corpora with the same one are the same."""
    total = hashlib.sha256()
    for document in corpus:
        total.update(hashlib.sha256(document.key.encode()).digest())
        total.update(hashlib.sha256(document.text.encode()).digest())
    return total.hexdigest()


def _stdlib() -> Iterator[Document]:
    return _files(Path(sysconfig.get_paths()["stdlib"]), ".py", without=_STDLIB_WITHOUT)


def _files(root: Path, suffix: str = "", without: frozenset[str] = frozenset()) -> Iterator[Document]:
    """The text files under `root`, in the order of their paths; hidden files and folders are left out."""
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in without and not name.startswith(".")]
        paths += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    keys = {path.relative_to(root).as_posix(): path for path in paths}
    for key in sorted(keys):
        if (text := _read(keys[key])) is not None:
            yield Document(key, text)


def _text_file(path: Path) -> Iterator[Document]:
    if (text := _read(path)) is None:
        raise UserError(f"--data {path} is not UTF-8 text")
    yield Document(path.name, text)


def _read(path: Path) -> str | None:
    """The text of a file; None if it isn't UTF-8 text or cannot be read."""
    try:
        data = path.read_bytes()
        return None if b"\0" in data else data.decode()
    except (OSError, UnicodeDecodeError):
        return None


def _pieces(document: Document) -> Iterator[Document]:
    """The document cut at the ends of lines."""
    piece: list[str] = []
    size = count = 0
    for line in document.text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield Document(f"{document.key}#{count}", "".join(piece))
            piece, size, count = [], 0, count + 1
    if piece:
        yield Document(f"{document.key}#{count}", "".join(piece))


def _dataset(source: str, column: str, kind: str | None = None) -> Iterator[Document]:
    datasets = _import_datasets(source)
    path = Path(source).expanduser()
    try:
        if kind is not None:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif path.exists():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(source)
    except Exception as error:
        raise UserError(f"--data {source}: datasets cannot load it: {type(error).__name__}: {error}") from error
    if isinstance(rows, dict):
        if "train" not in rows:
            raise UserError(f"--data {source} has no split named 'train', only {', '.join(map(str, rows))}")
        rows = rows["train"]
    if column not in rows.column_names:
        raise UserError(
            f"--data {source} has no column {column!r}; choose one with --text-column: {', '.join(rows.column_names)}"
        )
    for row in rows.select_columns(column):
        text = row[column]
        # Rows have no path, so the text itself decides.
        yield Document(hashlib.sha256(text.encode()).hexdigest(), text)


def _import_datasets(source: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"--data {source} is neither a text file nor a folder of them, and loading it as a dataset needs the "
            "`datasets` package: pip install 'moesaic[datasets]'"
        ) from error
