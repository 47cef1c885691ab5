"""Writers of metrics: JSON lines, and TensorBoard events if the package is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class MetricWriter(Protocol):
    """Takes numbers by name."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""

    def close(self) -> None:
        """Flush and close."""


class JsonlWriter:
    """One JSON object a line, with "step" first. Lines of steps after `last_step` are dropped: they are run again."""

    def __init__(self, path: Path, last_step: int = 0):
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _is_before(line, last_step)]
            fresh = path.with_suffix(".tmp")
            fresh.write_text("".join(f"{line}\n" for line in lines))
            os.replace(fresh, path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write a line, at once. NaN and infinity are written as null."""
        row = {name: value if abs(value) < float("inf") else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events, one scalar a name. Raises `ImportError` without the tensorboard package."""

    def __init__(self, folder: Path, last_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        self._writer.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _is_before(line: str, last_step: int) -> bool:
    # A crash may have cut the last line short.
    try:
        return json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False
