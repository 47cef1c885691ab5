"""What a run folder has recorded, read without its checkpoints; also that of a run that goes on or has ended early."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moesaic.checkpoint import checkpoints
from moesaic.checkpoint.folder import step_of
from moesaic.checkpoint.run_folder import CHECKPOINTS, CONFIG, METRICS, RESULT
from moesaic.train.errors import UserError
from moesaic.train.metrics import EXPERT_LOAD, read_jsonl


@dataclass(frozen=True)
class Record:
    """What is known of a run."""

    name: str
    settings: dict[str, Any]
    """As `moesaic train` has resolved them."""
    about: dict[str, Any]
    """Processes, parameters and versions."""
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, in the order of steps."""
    result: dict[str, Any] | None
    """What was measured at the end; None for a run that has not ended."""
    saved: int | None
    """The step of the newest checkpoint."""
    notes: list[str]
    """What is missing or damaged."""

    @property
    def step(self) -> int:
        """The last step that is known of."""
        steps = [row["step"] for row in self.rows] + [self.saved or 0, (self.result or {}).get("step") or 0]
        return max(steps)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was taken and is a number."""
        found = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        return [step for step, _ in found], [value for _, value in found]

    @cached_property
    def loads(self) -> list[tuple[int, dict[str, list[int]]]]:
        """Steps, and of each layer the tokens of its experts."""
        return [(row["step"], row[EXPERT_LOAD]) for row in self.rows if _is_load(row.get(EXPERT_LOAD))]


def read_runs(folders: Sequence[Path]) -> list[Record]:
    """The records of runs, each with a name of its own. Raises `UserError` for a folder that is none of a run."""
    unique = list(dict.fromkeys(folder.expanduser().resolve() for folder in folders))
    return [_read(folder, name) for folder, name in zip(unique, _names(unique), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as tell them apart."""
    most = max(len(folder.parts) for folder in folders)
    for count in range(1, most + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> Record:
    try:
        about = json.loads((folder / CONFIG).read_text())
        settings = about.pop("settings")
        about.pop("model", None)
        if not isinstance(settings, dict):
            raise TypeError("its settings are no object")
    except FileNotFoundError:
        raise UserError(f"{folder}: {_why_none(folder)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the settings of the run in {folder / CONFIG}: {error!r}") from error
    notes: list[str] = []
    try:
        rows = sorted(read_jsonl(folder / METRICS), key=lambda row: row["step"])
    except OSError as error:
        rows = []
        notes.append(f"{METRICS} cannot be read: {error.strerror or error}")
    if rows and not any(_is_load(row.get(EXPERT_LOAD)) for row in rows):
        notes.append(f"{METRICS} has no load of experts; an older version of moesaic wrote it")
    result: dict[str, Any] | None = None
    try:
        found = json.loads((folder / RESULT).read_text())
        result = found if isinstance(found, dict) else None
    except FileNotFoundError:
        notes.append("the run has not ended")
    except (OSError, ValueError) as error:
        notes.append(f"{RESULT} cannot be read: {error}")
    saved = checkpoints(folder / CHECKPOINTS)
    return Record(name, settings, about, rows, result, step_of(saved[-1]) if saved else None, notes)


def _why_none(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    hint = (
        f"; there are runs in it: {', '.join(inside[:5])}" if inside else "; a run folder is what `moesaic train` makes"
    )
    return f"there is no run in this folder, it has no {CONFIG}{hint}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_load(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_counts, value.values()))


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(count) is int for count in value)
