"""Text, or conversations, as documents, each of which is either for training or held out.

A document is held out by a hash of its key (its path within the corpus), so the choice is the same on every machine
and does not move when other documents come or go. Of documents with the same text only the first counts: what is
held out is never trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesaic.train.errors import UserError
from moesaic.train.rows import Row, is_table, read_rows

HELD_OUT_PART = 0.05
# Without tests, which would be most of it, and without what was written by a program.
_STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
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


@dataclass(frozen=True)
class Conversation(Document):
    """A document whose text is JSON: `{"messages"}` or `{"messages", "tools"}`, or `{"prompt", "completion"}`."""

    place: str = ""
    """Where it is from, for errors."""


def documents(source: str, text_column: str | None = None) -> Sequence[Document]:
    """The documents of `source`, in a fixed order, no two with the same text; all or none are `Conversation`s.

    `source` is "stdlib", a folder of text files, a text file, or rows: a .jsonl file or a folder of them, or a dataset
    that the `datasets` library can load (.json, .csv, .parquet, a folder of `save_to_disk`, or a name). Rows are
    conversations if they have a column "messages", or have "prompt" and "completion" and no "text"; unless
    `text_column` is given. Raises `UserError` if there is no text, or a row is not like the first.
    """
    path = Path(source).expanduser()
    if source == "stdlib":
        found = _stdlib()
    elif is_table(path):
        found = _from_rows(source, text_column)
    elif path.is_file():
        found = _text_file(path)
    elif path.is_dir():
        found = _files(path)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        found = _from_rows(source, text_column)
    else:
        raise UserError(f"--data {source}: there is no such file or folder")

    unique: dict[bytes, Document] = {}
    for document in found:
        if document.text:
            unique.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    result = list(unique.values())
    if result and isinstance(result[0], Conversation):
        if len(result) < 2:
            raise UserError(f"--data {source}: one conversation is too few to train on some and hold out others")
        return result
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


def split(corpus: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """The documents for training, and those held out; of a few conversations at least one."""
    held_out = [document for document in corpus if document.held_out]
    if not held_out:
        held_out = [min(corpus, key=lambda document: hashlib.sha256(document.key.encode()).digest())]
    kept_back = {document.key for document in held_out}
    return [document for document in corpus if document.key not in kept_back], held_out


def fingerprint(corpus: Sequence[Document]) -> str:
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


def _from_rows(source: str, text_column: str | None) -> Iterator[Document]:
    columns: tuple[str, ...] = ()
    for row in read_rows(source):
        columns = columns or _choose_columns(row, text_column)
        lacking = [column for column in columns if row.values.get(column) is None]
        if lacking:
            raise UserError(f"--data {row.place}: no {' and no '.join(map(repr, lacking))}, which the first row has")
        # Rows have no path, so the text itself decides.
        if columns == ("messages",):
            _check_messages(row)
            kept = {"messages": row.values["messages"], "tools": row.values.get("tools") or None}
            text = json.dumps({name: value for name, value in kept.items() if value is not None})
            yield Conversation(hashlib.sha256(text.encode()).hexdigest(), text, row.place)
        elif columns == ("prompt", "completion"):
            _check_strings(row, columns)
            text = json.dumps({name: row.values[name] for name in columns})
            yield Conversation(hashlib.sha256(text.encode()).hexdigest(), text, row.place)
        else:
            _check_strings(row, columns)
            text = row.values[columns[0]]
            yield Document(hashlib.sha256(text.encode()).hexdigest(), text)


def _choose_columns(row: Row, text_column: str | None) -> tuple[str, ...]:
    choices = [("messages",), ("text",), ("prompt", "completion")] if text_column is None else [(text_column,)]
    for columns in choices:
        if set(columns) <= row.values.keys():
            return columns
    wanted = "'messages', 'text', or 'prompt' and 'completion'" if text_column is None else repr(text_column)
    raise UserError(
        f"--data {row.place}: no column {wanted}; choose one that holds text with --text-column: "
        f"{', '.join(row.values)}"
    )


def _check_strings(row: Row, columns: Sequence[str]) -> None:
    for column in columns:
        if not isinstance(row.values[column], str):
            raise UserError(f"--data {row.place}: {column!r} must be a string, not {type(row.values[column]).__name__}")


def _check_messages(row: Row) -> None:
    messages = row.values["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"--data {row.place}: 'messages' must be a list of messages, and not empty")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"--data {row.place}: message {number} must be an object with 'role' and 'content', got {message!r:.60}"
            )
