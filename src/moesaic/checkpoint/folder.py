"""Checkpoint folders on disk: names, manifests, which are complete, which may go. No collectives here."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.checkpoint import exchange
from moesaic.checkpoint.exchange import OLD
from moesaic.checkpoint.sealed import difference, unseal, write_sealed

MANIFEST = "manifest.json"
_FORMAT = 2
# Format 1 had no hash of the manifest itself.
_READABLE = (1, 2)
_NAME = re.compile(r"step-(\d{8,})")
# What a checkpoint that is being removed is called.
_GONE = ".gone"


class CheckpointError(Exception):
    """A checkpoint could not be written, or must not be read. The text names the file and the problem."""


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    step: int
    world_size: int
    """How many ranks wrote it. Any number of ranks can read it."""
    info: dict[str, Any]
    """JSON values of the caller."""
    files: dict[str, dict[str, Any]]
    """The size ("bytes") and hash ("sha256") of each file."""
    format: int = _FORMAT


def folder_name(step: int) -> str:
    """`step-00000100` for step 100."""
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step: must be an int of at least 0, got {step!r}")
    return f"step-{step:08d}"


def checkpoints(root: str | Path) -> list[Path]:
    """The complete checkpoints in `root`, oldest first."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint in `root`, if there is one."""
    return max(checkpoints(root), key=step_of, default=None)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name.removesuffix(OLD))
    if match is None:
        raise CheckpointError(f"{path} does not have the name of a checkpoint, such as step-00000100")
    return int(match[1])


def check_info(info: dict[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` unless `info` can be written as JSON."""
    try:
        json.dumps(info)
    except (TypeError, ValueError, RecursionError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"info: only JSON values can be saved (dicts, lists, text, numbers, None): {error}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write manifest.json into a checkpoint folder and flush both to disk."""
    write_sealed(path / MANIFEST, dataclasses.asdict(manifest) | {"format": _FORMAT})


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the checkpoint in `path`; `CheckpointError` if it is damaged or of another format."""
    path = Path(path)
    file = path / MANIFEST
    try:
        text = file.read_bytes().decode()
        values = json.loads(text)
        if values["format"] not in _READABLE:
            known = " and ".join(map(str, _READABLE))
            raise CheckpointError(f"{file} has format {values['format']!r}; this version reads formats {known}")
        manifest = Manifest(**(values if values["format"] == 1 else unseal(text)))
        sound = (
            isinstance(manifest.step, int)
            and isinstance(manifest.world_size, int)
            and isinstance(manifest.info, dict)
            and all(
                # A manifest must not point outside of its folder.
                is_plain(name) and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
                for name, entry in manifest.files.items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error or type(error).__name__}") from error
    if not sound or manifest.step != step_of(path):
        raise CheckpointError(f"{file} is damaged: it does not describe {path.name}")
    return manifest


def is_plain(name: str) -> bool:
    """Whether this is the name of a file in a folder, and not a path that leads elsewhere."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def check_contents(path: Path, manifest: Manifest) -> None:
    """Raise `CheckpointError` unless the folder has the files of its manifest, and no others."""
    listed = {MANIFEST, *manifest.files}
    try:
        found = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if missing := sorted(listed - found):
        raise CheckpointError(f"{path / missing[0]} is missing")
    if surplus := sorted(found - listed):
        raise CheckpointError(f"{path / surplus[0]} is not in {MANIFEST}; a checkpoint has no other files than those")


def verify_file(path: Path, entry: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless the file matches its entry."""
    try:
        what = difference(path, entry)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if what is not None:
        raise CheckpointError(f"{path} is damaged: it {what}")


def recover(root: Path) -> None:
    """Bring back checkpoints that a crash has left without their name, while they were written once more."""
    if not root.is_dir():
        return
    for old in root.glob(f"step-*{OLD}"):
        if _NAME.fullmatch(old.stem):
            exchange.recover(old.with_suffix(""), _is_whole)


def _is_whole(old: Path) -> bool:
    try:
        check_contents(old, read_manifest(old))
    except CheckpointError:
        return False
    return True


def remove(path: Path) -> None:
    """Remove a checkpoint. If this is interrupted, the rest is not mistaken for a complete checkpoint."""
    leftover = path.with_name(path.name + _GONE)
    shutil.rmtree(leftover, ignore_errors=True)
    os.rename(path, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def prune(root: Path, keep: int, newest: int, spare: Collection[int] = ()) -> None:
    """Remove all but the `keep` newest checkpoints up to step `newest`, and what crashes have left behind.

    Checkpoints of the steps in `spare` stay.
    """
    # These first: what is left of a checkpoint that was replaced must not outlive the one that replaced it.
    for path in root.iterdir():
        if path.name.endswith((".tmp", OLD, _GONE)) and _NAME.fullmatch(path.stem):
            shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in checkpoints(root) if step_of(path) <= newest][:-keep]:
        if step_of(path) not in spare:
            remove(path)
