"""The run folder: make a new one, or find the one to go on in. :mod:`moesaic.checkpoint.run_folder` has its names."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from moesaic.checkpoint import checkpoints
from moesaic.checkpoint.folder import recover
from moesaic.checkpoint.run_folder import CHECKPOINTS, CONFIG, FAILURES, LOCK, TOKENIZER
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError

RUNS = Path("runs")
# What a run may have made before its config.json.
_AT_START = (LOCK, FAILURES, TOKENIZER)


def settle_resume(config: TrainConfig) -> TrainConfig:
    """Decide what `--resume auto` means here: to go on from a checkpoint, or to start.

    So does a run that torchrun has restarted. The result has `resume` True, or False; or still "auto", and then `out`
    is the folder of a run that has saved nothing yet, in which it is to start again. Raises `UserError` if there are
    other things in the folder.
    """
    resume, out = config.resume, config.out
    if resume is False and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = "auto"
        out = out or _folder_of_launch()
        if out is None:
            return config
    if resume != "auto":
        return config
    if out is None:
        out = _newest_run()
        return dataclasses.replace(config, out=out, resume=out is not None)
    recover(out / CHECKPOINTS)
    if checkpoints(out / CHECKPOINTS):
        return dataclasses.replace(config, out=out, resume=True)
    if (out / CONFIG).is_file() or not out.is_dir() or all(path.name in _AT_START for path in out.iterdir()):
        return dataclasses.replace(config, out=out, resume="auto")
    raise UserError(f"--out {out} has files, but no run; choose another folder")


def launch_id() -> list[str]:
    """What the processes of a launch by torchrun have in common, also after a restart; empty without torchrun.

    Users may give the same id to many launches, and the default is the same for all. So the launcher's process counts.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return [] if run_id is None else [run_id, socket.gethostname(), str(os.getppid())]


def _folder_of_launch() -> Path | None:
    """The run that this launch has begun before it was restarted."""
    for path in RUNS.glob(f"*/{LOCK}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(path.read_text()).get("launch") == launch_id():
                return path.parent
    return None


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


def again_folder(out: Path | None) -> Path:
    """The folder of a run that has saved nothing and is to start again; it is made if it is not there yet."""
    assert out is not None
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
        raise UserError(
            f"--out {out} is not empty. Add --resume to continue the run in it, or choose another folder. A run that "
            "has no checkpoint yet starts again there with --resume auto"
        )


def resumable_folder(out: Path | None) -> Path:
    """The folder of the run to continue: `out`, or the run in runs/ with the newest checkpoint."""
    if out is None:
        if (newest := _newest_run()) is None:
            raise UserError(f"--resume: no run in {RUNS}/ has a checkpoint; give its folder with --out")
        return newest
    recover(out / CHECKPOINTS)
    if not (out / CONFIG).is_file():
        raise UserError(f"--resume: there is no run in {out} (no {CONFIG})")
    if not checkpoints(out / CHECKPOINTS):
        raise UserError(f"--resume: the run in {out} has no checkpoint yet; --resume auto starts it again there")
    return out


def _newest_run() -> Path | None:
    """The run in runs/ with the newest checkpoint."""
    found = [path for path in RUNS.glob("*") if checkpoints(path / CHECKPOINTS)]
    return max(found, key=lambda path: ((path / CHECKPOINTS).stat().st_mtime, path.name), default=None)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` atomically: a reader sees the old file or the new one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(fresh, path)
