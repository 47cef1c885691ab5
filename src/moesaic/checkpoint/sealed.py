"""JSON files that guard themselves, and folders that such a file guards.

A sealed file has its own hash: that of its text with zeros in place of the hash. So no changed bit goes unseen. (The
hash finds accidents. Whoever can write the file can write the hash.)
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_HASH = "sha256"
_NO_HASH = "0" * 64


def write_sealed(file: Path, values: dict[str, Any]) -> None:
    """Write JSON values and their hash, and flush file and folder to disk."""
    text = json.dumps(values | {_HASH: _NO_HASH}, indent=1)
    # The last key's value: whatever else has so many zeros is before it.
    before, _, after = text.rpartition(_NO_HASH)
    with open(file, "w", encoding="utf-8", newline="") as opened:
        opened.write(before + _digest(text) + after)
        opened.flush()
        os.fsync(opened.fileno())
    flush(file.parent)


def unseal(text: str) -> dict[str, Any]:
    """The values of a sealed text. Raises `ValueError`, `KeyError` or `TypeError` if it is damaged."""
    values = json.loads(text)
    given = values.pop(_HASH)
    before, found, after = text.rpartition(given)
    if not found or _digest(before + _NO_HASH + after) != given:
        raise ValueError("it has changed since it was written")
    return values


def describe_file(path: Path) -> dict[str, Any]:
    """The size ("bytes") and hash ("sha256") of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def difference(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file, for one that does not match its description; None if it does. `OSError` passes."""
    # A truncated file is found out without reading it.
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {size} bytes, not {entry['bytes']}"
    return None if describe_file(path) == entry else "has changed since it was written"


def seal_folder(folder: Path, seal: str, values: dict[str, Any]) -> None:
    """Flush all files of a folder, and write `values` into its file `seal`, with the hash of every other file."""
    flush_all(folder)
    files = {path.relative_to(folder).as_posix(): describe_file(path) for path in _files(folder)}
    write_sealed(folder / seal, values | {"files": files})


def open_folder(folder: Path, seal: str) -> dict[str, Any]:
    """The values of a sealed folder, all of whose files are as they were. Raises `ValueError` that says what is not."""
    try:
        values = unseal((folder / seal).read_bytes().decode())
        files = values.pop("files")
        found = {path.relative_to(folder).as_posix() for path in _files(folder)} - {seal}
        if found != files.keys():
            raise ValueError(f"{min(found ^ files.keys())} is missing, or is not listed")
        for name, entry in files.items():
            if what := difference(folder / name, entry):
                raise ValueError(f"{name} {what}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return values


def flush_all(folder: Path) -> None:
    """Flush every file below a folder to disk, and the folders."""
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def flush(folder: Path) -> None:
    """Flush a folder's entries to disk: a rename survives a power cut only after that."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
