"""Writers of metrics: JSON lines, and TensorBoard events if the package is installed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

# A number; or of each layer the tokens that each of its experts got, or a number.
Value = float | Mapping[str, Sequence[int]] | Mapping[str, float]


# The seconds since 1970 at which a row was written.
TIME = "time"
# Of each layer, by its name in the model, the tokens that each expert got in the step.
EXPERT_LOAD = "expert_load"
# Of each layer the entropy of its router's scores, over that of equal scores.
ROUTER_ENTROPY = "router_entropy_of"


def busiest(tokens: Sequence[int]) -> float:
    """How many times the mean the busiest expert of a layer got; 0 if no expert got a token."""
    return max(tokens) * len(tokens) / max(1, sum(tokens))


@runtime_checkable
class MetricWriter(Protocol):
    """Takes values by name."""

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Record the values of a step."""

    def close(self) -> None:
        """Flush and close."""


class JsonlWriter:
    """One JSON object a line, with "step" first. Lines of steps after `last_step` are dropped: they are run again.

    So are damaged lines. A line that cannot be written is written with the next one.
    """

    def __init__(self, path: Path, last_step: int = 0):
        if path.exists():
            lines = [line for line, row in _lines(path) if row is not None and row["step"] <= last_step]
            fresh = path.with_suffix(".tmp")
            fresh.write_bytes(b"".join(line + b"\n" for line in lines))
            os.replace(fresh, path)
        # Without a buffer: what has been written is known.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._unwritten = b""

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Write a line, at once. NaN and infinity are written as null."""
        row = {name: value if _is_plain(value) else None for name, value in values.items()}
        self._unwritten += json.dumps({"step": step, **row}).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._unwritten) != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        except OSError:
            # Not half a line, which the next one would end.
            self._file.truncate(end)
            raise
        self._unwritten = b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events: one scalar a name; of the load of experts a picture of all layers, and a histogram of each.

    Raises `ImportError` without the packages tensorboard and pillow.
    """

    def __init__(self, folder: Path, last_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        from moesaic.train import load_picture

        self._pictures = load_picture
        self._writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1)

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Record the values of a step."""
        for name, value in values.items():
            # Events have a time of their own.
            if isinstance(value, float) and name != TIME:
                self._writer.add_scalar(name, value, step)
        loads: Any = values.get(EXPERT_LOAD) or {}
        if loads:
            self._writer.add_image(EXPERT_LOAD, self._pictures.load_picture(loads), step, dataformats="HWC")
        for layer, load in loads.items():
            self._writer.add_histogram(f"{EXPERT_LOAD}/{layer}", self._pictures.relative(load), step)
        entropy: Any = values.get(ROUTER_ENTROPY) or {}
        for layer, value in entropy.items():
            self._writer.add_scalar(f"router_entropy_of/{layer}", value, step)

    def close(self) -> None:
        """Flush the events."""
        self._writer.close()


class LenientWriter:
    """A writer whose failures are told once and then ignored: a full disk must not end a training.

    Args:
        writer: the writer.
        name: of it, for the warning.
        warn: shows a warning.
    """

    def __init__(self, writer: MetricWriter, name: str, warn: Callable[[str], None]):
        self._writer, self._name, self._warn = writer, name, warn
        self._warned = False

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Record the values of a step."""
        self._try(lambda: self._writer.log(values, step))

    def close(self) -> None:
        """Flush and close."""
        self._try(self._writer.close)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if not self._warned:
                self._warn(f"warning: cannot write {self._name}: {error.strerror or error}; training continues")
            self._warned = True


def _is_plain(value: Value) -> bool:
    """Whether JSON can hold it."""
    return isinstance(value, Mapping) or abs(value) < float("inf")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file that are not damaged."""
    return [row for _, row in _lines(path) if row is not None]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line and its row; None for a damaged one. (A crash may have cut the last line short.)"""
    for line in path.read_bytes().splitlines():
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        yield line, row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
