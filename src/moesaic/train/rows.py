"""Rows of a table, each with the place it is from: JSON and CSV are read here, the rest by the `datasets` library."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.train.errors import UserError, first_line
from moesaic.train.hub import check_on_hub
from moesaic.train.textfiles import UnreadableError, kind_of, read_lines, read_text, shown

_LINES = (".jsonl", ".ndjson", ".jsonlines")
_PACKED = (".gz", ".bz2", ".xz")


class RowError(Exception):
    """A row cannot be used; the text says why and what to do, without the place."""


class Row(NamedTuple):
    """The values of a row by column, and where it is: file and line, or dataset and row."""

    place: str
    values: Mapping[str, Any]


def is_lines(name: str) -> bool:
    """Whether a file of this name holds a row of JSON on each line."""
    return _suffix(name) in _LINES


def is_table(path: Path) -> bool:
    """Whether a file or folder holds rows and not text."""
    if kind_of(path) != "a folder":
        return _suffix(path.name) in (*_READERS, ".parquet") and kind_of(path) is not None
    return _is_saved(path) or bool(_table_files(path))


def read_rows(source: str, path: Path) -> Iterator[Row]:
    """The rows of a file, a folder of such files, or a dataset, in order. `UserError` names file and row."""
    files = _table_files(path) if kind_of(path) == "a folder" and not _is_saved(path) else [path]
    for file in files:
        reader = _READERS.get(_suffix(file.name)) if kind_of(path) is not None else None
        if reader is not None:
            try:
                yield from reader(file)
            except UnreadableError as error:
                line = "" if error.line is None else f":{error.line}"
                raise UserError(f"--data {shown(file)}{line}: {error}") from error
        else:
            for number, values in enumerate(_load_dataset(source, file), 1):
                yield Row(f"{source if file == path else shown(file)}, row {number}", values)


def _suffix(name: str) -> str:
    """In lower case, without that of a packed file: .jsonl of Chats.JSONL.gz."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in _PACKED else path.suffix


def _is_saved(folder: Path) -> bool:
    """Whether a folder is one of the `datasets` library's `save_to_disk`."""
    return any(kind_of(folder / name) is not None for name in ("dataset_info.json", "dataset_dict.json"))


def _table_files(folder: Path) -> list[Path]:
    """The files of a folder, if all that can be seen there are lines of JSON, or all are parquet."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    all_lines = all(is_lines(path.name) for path in paths)
    return paths if all_lines or all(_suffix(path.name) == ".parquet" for path in paths) else []


def _read_json_lines(file: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            place = f"{shown(file)}:{number}"
            yield _object(_parse(line, place), place)


def _read_json(file: Path) -> Iterator[Row]:
    """One array of objects; or an object on each line, as some call .json."""
    text = read_text(file).strip()
    if not text:
        return
    if not text.startswith("["):
        yield from _read_json_lines(file) if _is_object(text.partition("\n")[0]) else [_whole(text, file)]
        return
    for number, values in enumerate(_parse(text, shown(file)), 1):
        yield _object(values, f"{shown(file)}, row {number}")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _whole(text: str, file: Path) -> Row:
    return _object(_parse(text, shown(file)), shown(file))


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"--data {place}: not a line of JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"--data {place}: this JSON is nested too deeply to be read; take it out") from error


def _object(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise UserError(f'--data {place}: expected an object such as {{"text": ...}}, got {type(values).__name__}')
    return Row(place, values)


def _read_csv(file: Path) -> Iterator[Row]:
    """Every cell as the string that it is."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(read_lines(file), strict=True)
    try:
        for values in reader:
            place = f"{shown(file)}:{reader.line_num}"
            if None in values:
                raise UserError(
                    f"--data {place}: this row has more cells than the first line has columns; put cells that hold "
                    "commas into quotes"
                )
            yield Row(place, values)
    except csv.Error as error:
        raise UserError(f"--data {shown(file)}:{reader.reader.line_num}: not a row of CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **dict.fromkeys(_LINES, _read_json_lines),
    ".json": _read_json,
    ".csv": _read_csv,
}


def _load_dataset(source: str, path: Path) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"--data {shown(source)}: it needs the `datasets` package: "
            "pip install '.[datasets]' in a checkout of moesaic"
        ) from error
    kind = kind_of(path)
    if kind is None:
        check_on_hub("--data", source, "dataset")
    try:
        if kind is None:
            rows = datasets.load_dataset(source)
        elif kind == "a folder":
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:
        raise UserError(f"--data {shown(source)}: datasets cannot load it: {first_line(error)}") from error
    if isinstance(rows, dict):
        if "train" not in rows:
            raise UserError(f"--data {source} has no split named 'train', only {', '.join(map(str, rows))}")
        rows = rows["train"]
    return rows
