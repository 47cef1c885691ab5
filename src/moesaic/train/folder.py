"""The run folder: make a new one, or find the one to go on in. :mod:`moesaic.checkpoint.run_folder` has its names."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from moesaic.checkpoint import checkpoints
from moesaic.checkpoint.run_folder import CHECKPOINTS, CONFIG, LOCK
from moesaic.train.errors import UserError

RUNS = Path("runs")


def new_folder(out: Path | None) -> Path:
    """Make the folder of a new run: `out`, which must be empty, or runs/<date>-<time>."""
    if out is None:
        stamp = RUNS / time.strftime("%Y%m%d-%H%M%S")
        out, count = stamp, 2
        # Of runs that start in the same second each gets a folder of its own.
        while not _make(out, exclusive=True):
            out, count = stamp.with_name(f"{stamp.name}-{count}"), count + 1
        return out
    check_free(out)
    _make(out)
    return out


def _make(out: Path, *, exclusive: bool = False) -> bool:
    """Make a folder. Whether it was made; `exclusive`: False if it is there already."""
    try:
        out.mkdir(parents=True, exist_ok=not exclusive)
    except FileExistsError:
        if exclusive:
            return False
        raise UserError(f"--out {out}: this is a file; choose another name") from None
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this folder: {error.strerror}") from error
    return True


def check_free(out: Path) -> None:
    """Raise `UserError` if the folder is not empty, or is not a folder."""
    try:
        filled = out.exists() and any(path.name != LOCK for path in out.iterdir())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    if filled:
        raise UserError(f"--out {out} is not empty. Add --resume to continue the run in it, or choose another folder")


def resumable_folder(out: Path | None) -> Path:
    """The folder of the run to continue: `out`, or the run in runs/ with the newest checkpoint."""
    if out is None:
        found = [path for path in RUNS.glob("*") if checkpoints(path / CHECKPOINTS)]
        if not found:
            raise UserError(f"--resume: no run in {RUNS}/ has a checkpoint; give its folder with --out")
        return max(found, key=lambda path: ((path / CHECKPOINTS).stat().st_mtime, path.name))
    if not (out / CONFIG).is_file():
        raise UserError(f"--resume: there is no run in {out} (no {CONFIG})")
    if not checkpoints(out / CHECKPOINTS):
        raise UserError(f"--resume: the run in {out} has no checkpoint yet; start it again in another folder")
    return out


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` atomically: a reader sees the old file or the new one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(fresh, path)
