"""The file of ``moesaic tune``: what was measured to be the fastest, by kind of machine.

``MOESAIC_TUNED`` names it; by default it is ``tuned.json`` in ``$XDG_CACHE_HOME/moesaic`` (``~/.cache/moesaic``).
``MOESAIC_TUNED=none`` does without one. Only ``moesaic tune`` writes to it. A file that cannot be read counts for
nothing, with a warning that names it.
"""

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moesaic.ops import library
from moesaic.ops.choices import Choices, from_json, to_json
from moesaic.ops.processor import Processor, cpuinfo

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1
# Largest number of threads of a class: with more of them, memory is shared by more.
_THREADS = (1, 8, 32)


class Kind(NamedTuple):
    """What a measurement holds for.

    Attributes:
        processor: the name that it gives itself.
        kernels: the instruction set that the CPU kernels use.
        library: a hash of the kernels' library.
        torch: its version.
        threads: a class of numbers of threads.
    """

    processor: str
    kernels: str
    library: str
    torch: str
    threads: str


class Tuned(NamedTuple):
    """What the file says of a kind of machine.

    Attributes:
        choices: the fastest implementation, of what was measured.
        measured: the day.
        seconds: of each implementation, for people: by dtype, operator and shape.
    """

    choices: Choices
    measured: str
    seconds: Any = None


def threads_class(threads: int) -> str:
    """The class that a number of threads is in: ``"1"``, ``"2-8"``, ``"9-32"`` or ``"33+"``."""
    least = 1
    for most in _THREADS:
        if threads <= most:
            return str(most) if least == most else f"{least}-{most}"
        least = most + 1
    return f"{least}+"


def kind_of(machine: Processor, threads: int) -> Kind:
    """This machine, whose processor is given, with a number of threads."""
    model = cpuinfo().get("model name", machine.vendor)
    return Kind(model, machine.kernels, _hash_of_library(), torch.__version__, threads_class(threads))


@functools.cache
def _hash_of_library() -> str:
    try:
        return hashlib.sha256(library.PATH.read_bytes()).hexdigest()[:16]
    except OSError:
        return "none"


def file() -> Path | None:
    """Where the file is, or would be; None if the environment does without one, or there is no home for it."""
    named = os.environ.get("MOESAIC_TUNED")
    if named == "none":
        return None
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic" / "tuned.json"
    except RuntimeError:  # no HOME, and no such user
        return None


def read(path: Path) -> dict[Kind, Tuned]:
    """All that a file says; nothing if there is none.

    Raises:
        ValueError: it cannot be read, or is not such a file; the text names it.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        return {_kind(one["of"]): _tuned(one) for one in found["machines"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise ValueError(f"the file of moesaic tune, {path}, cannot be used: {reason}") from error


def _kind(values: Any) -> Kind:
    if not isinstance(values, dict) or values.keys() != set(Kind._fields) or {*map(type, values.values())} != {str}:
        raise ValueError(f"it names a machine {values!r:.80}")
    return Kind(**values)


def _tuned(values: Any) -> Tuned:
    return Tuned(from_json(values["fastest"]), str(values["measured"]), values.get("seconds"))


def found(machine: Processor, threads: int) -> Tuned | None:
    """What the file says of this machine. One that cannot be used is warned of, and counts for nothing."""
    path = file()
    if path is None or machine.kernels == "none":
        return None
    try:
        return read(path).get(kind_of(machine, threads)) if path.exists() else None
    except (ValueError, OSError) as error:
        warnings.warn(f"{error}; moesaic goes on without it. `moesaic tune` writes it anew", stacklevel=2)
        return None


def keep(path: Path, kind: Kind, tuned: Tuned | None) -> bool:
    """Write what was measured on a kind of machine; None forgets it. Whether the file said anything of it before.

    A reader sees the old file or the new one, and what others write at the same time stays.

    Raises:
        OSError: it cannot be written.
    """

    def change(machines: dict[Kind, Tuned]) -> bool:
        known = machines.pop(kind, None) is not None
        if tuned is not None:
            machines[kind] = tuned
        return known

    if tuned is None and not path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        return _rewrite(path, change)


def _rewrite(path: Path, change: Callable[[dict[Kind, Tuned]], bool]) -> bool:
    try:
        machines = read(path)
    except ValueError:
        machines = {}  # it is written anew
    known = change(machines)
    values = [
        {"of": kind._asdict(), "measured": one.measured, "fastest": to_json(one.choices), "seconds": one.seconds}
        for kind, one in machines.items()
    ]
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as part:
            part.write(json.dumps({"format": _FORMAT, "machines": values}, indent=1) + "\n")
            part.flush()
            os.fsync(part.fileno())
        os.chmod(name, 0o644)  # others read it, too
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return known


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time is in this, where the file system has locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
