"""Rows of a table, each with the place it is from: JSON lines are read here, the rest by the `datasets` library."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.train.errors import UserError

_FORMATS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Row(NamedTuple):
    """The values of a row by column, and where it is: file and line, or dataset and row."""

    place: str
    values: Mapping[str, Any]


def is_table(path: Path) -> bool:
    """Whether a file or folder holds rows and not text."""
    if path.is_file():
        return path.suffix == ".jsonl" or path.suffix in _FORMATS
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file() or bool(_line_files(path))


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a file, a folder of .jsonl files, or a dataset, in order. `UserError` names file and line."""
    path = Path(source).expanduser()
    files = [path] if path.suffix == ".jsonl" else _line_files(path)
    if files:
        for file in files:
            yield from _read_lines(file)
        return
    for number, values in enumerate(_load_dataset(source, path), 1):
        yield Row(f"{source}, row {number}", values)


def _line_files(folder: Path) -> list[Path]:
    """The files of a folder, if all that can be seen there are .jsonl."""
    if not folder.is_dir():
        return []
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return paths if all(path.suffix == ".jsonl" and path.is_file() for path in paths) else []


def _read_lines(file: Path) -> Iterator[Row]:
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{file}:{number}"
                    yield Row(place, _parse(line, place))
    except OSError as error:
        raise UserError(f"--data {file}: {error.strerror}") from error


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"--data {place}: not a line of JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f'--data {place}: expected an object such as {{"text": ...}}, got {type(values).__name__}')
    return values


def _load_dataset(source: str, path: Path) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"--data {source} is neither text nor .jsonl, and loading it as a dataset needs the `datasets` package: "
            "pip install 'moesaic[datasets]'"
        ) from error
    try:
        if path.is_file():
            rows = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
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
    return rows
