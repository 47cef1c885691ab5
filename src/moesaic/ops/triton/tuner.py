"""Time a kernel's configurations and remember the best, on disk, by device and by the kernels' sources.

Asked for by ``MOESAIC_TRITON_AUTOTUNE``: ``1`` times what no file knows, ``read`` only looks it up, ``0`` does neither.
Or by :func:`tuning` in a program; then the environment makes no difference. The file lies in ``MOESAIC_CACHE_DIR``
(default ``~/.cache/moesaic``); deleting it forgets. An entry is the key of a launch, with its configuration, and with
the configurations that failed and why.

A rank that tunes in the middle of a step would let the others wait. So ``1`` is refused where there are several, and
:func:`moesaic.parallel.tune_kernels` tunes beforehand. While a CUDA graph is captured nothing can be timed, and what is
not known yet runs in its default configuration: call once before capturing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

_log = logging.getLogger(__name__)
_ROUNDS = 5
_MODES = {"0": "off", "1": "tune", "read": "read"}

# An entry of a table: {"config": {...}, "failed": {configuration: error}}.
Table = dict[str, dict[str, Any]]
_known: dict[Path, Table] = {}
_asked: str | None = None


def mode() -> str:
    """``"tune"``, ``"read"`` or ``"off"``.

    Raises:
        ValueError: the environment asks for something else, or for tuning within a call on one of several ranks.
    """
    if _asked is not None:
        return _asked
    value = os.environ.get("MOESAIC_TRITON_AUTOTUNE", "0")
    if value not in _MODES:
        raise ValueError(
            f"MOESAIC_TRITON_AUTOTUNE: got {value!r}; set it to 1 to tune, read to use what was tuned before, or 0"
        )
    if value == "1" and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            "MOESAIC_TRITON_AUTOTUNE: 1 tunes within a call, and ranks would wait for each other in it; "
            "call moesaic.parallel.tune_kernels before training, or tune in one process and set it to read"
        )
    return _MODES[value]


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Within, every launch that no file knows is timed; afterwards what is known goes on being used."""
    global _asked
    _asked = "tune"
    try:
        yield
    finally:
        _asked = "read"


def best(key: str, default: Any, device: torch.device, run: Callable[[Any], object]) -> Any:
    """The fastest of the default and its neighbours for ``key``, timed if no file knows it and timing is asked for.

    A configuration that fails is skipped, and named in a warning and in the file.
    """
    wanted = mode()
    if wanted == "off":
        return default
    file = cache_file(device)
    known = table(device)
    if key not in known:
        if wanted == "read" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return default
        known[key] = _tune(key, default, device, run)
        # Another process may have written since.
        _known[file] = known = _read(file) | known
        _write(file, known)
    return dataclasses.replace(default, **known[key]["config"])


def _tune(key: str, default: Any, device: torch.device, run: Callable[[Any], object]) -> dict[str, Any]:
    failed: dict[str, str] = {}
    timed: list[tuple[float, Any]] = []
    for config in neighbours(default):
        try:
            timed.append((_time(run, config, device), config))
        except Exception as error:  # whatever it is, another configuration may work
            failed[_named(config)] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            _log.warning("tuning %s: %s failed and is skipped: %s", key, _named(config), failed[_named(config)])
            try:
                _synchronize(device)
            except Exception as lost:
                raise RuntimeError(
                    f"tuning {key}: {_named(config)} broke the GPU's context ({failed[_named(config)]}), and this "
                    "process can do nothing more with it; unset MOESAIC_TRITON_AUTOTUNE, and please report it"
                ) from lost
    fastest = min(timed, key=lambda pair: pair[0])[1] if timed else default
    return {"config": dataclasses.asdict(fastest)} | ({"failed": failed} if failed else {})


def neighbours(default: Any) -> list[Any]:
    """The configurations worth timing: each differs from the default in one or two things, and fits where that does."""
    unspecialized = [{"specialized": False, "warps": 8}] if default.specialized else []
    changes: list[dict[str, int]] = [
        {},
        *unspecialized,
        {"stages": max(default.stages - 1, 1)},
        {"GROUP_M": 4 if default.GROUP_M != 4 else 8},
        {"GROUP_M": 16},
        {"ctas": 3 - min(default.ctas, 2)},
        {"BN": default.BN // 2},
        {"BN": default.BN // 2, "stages": default.stages + 1},
        {"BM": default.BM // 2},
        {"BM": default.BM // 2, "BN": default.BN // 2, "warps": 4, "ctas": 2},
        {"BK": default.BK // 2, "stages": default.stages + 1},
        {"warps": 4 if default.warps == 8 else 8},
    ]
    configs = [dataclasses.replace(default, **change) for change in changes]
    return list(dict.fromkeys(c for c in configs if min(c.BM, c.BN, c.BK) >= 16))


def table(device: torch.device) -> Table:
    """All that is known for a device; a copy of it can be given to :func:`adopt` in another process."""
    file = cache_file(device)
    return _known.setdefault(file, _read(file))


def adopt(entries: Table, device: torch.device) -> None:
    """Use these entries, and what was known before for others, from now on; no file is written."""
    global _asked
    table(device).update(entries)
    _asked = "read"


def cache_file(device: torch.device) -> Path:
    """Where the results for a device are kept."""
    folder = Path(os.environ.get("MOESAIC_CACHE_DIR") or Path.home() / ".cache" / "moesaic")
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device))
    return folder / f"triton-{slug}-triton{triton.__version__}-kernels{_sources()}.json"


def device_name(device: torch.device) -> str:
    """Of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@functools.cache
def _sources() -> str:
    """A digest of the kernels: what was tuned for others does not count."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _named(config: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())


def _time(run: Callable[[Any], object], config: Any, device: torch.device) -> float:
    """Seconds of the median of a few runs."""
    run(config)  # compiles
    seconds = []
    for _ in range(_ROUNDS):
        _synchronize(device)
        start = time.perf_counter()
        run(config)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(file: Path) -> Table:
    return json.loads(file.read_text()) if file.exists() else {}


def _write(file: Path, known: Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A process that reads meanwhile sees the old file or the new one.
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known, indent=1, sort_keys=True))
    part.replace(file)
