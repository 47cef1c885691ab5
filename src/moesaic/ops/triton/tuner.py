"""Time a kernel's configurations and remember the best, on disk, by device and version.

Asked for by ``MOESAIC_TRITON_AUTOTUNE=1``. The file lies in ``MOESAIC_CACHE_DIR`` (default ``~/.cache/moesaic``);
deleting it forgets. While a CUDA graph is captured nothing can be timed, and what is not known yet runs in its default
configuration: call once before capturing.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton

_ROUNDS = 5
_known: dict[Path, dict[str, Any]] = {}


def is_enabled() -> bool:
    """Whether the environment asks for tuning."""
    value = os.environ.get("MOESAIC_TRITON_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"MOESAIC_TRITON_AUTOTUNE: got {value!r}; set it to 1 to tune, 0 not to")
    return value == "1"


def best(key: str, default: Any, device: torch.device, run: Callable[[Any], object]) -> Any:
    """The fastest of the default and its neighbours for ``key``, timed if no file knows it."""
    file = cache_file(device)
    known = _known.setdefault(file, _read(file))
    if key not in known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return default
        timed = [(seconds, config) for config in neighbours(default) if (seconds := _time(run, config, device))]
        known[key] = dataclasses.asdict(min(timed, key=lambda pair: pair[0])[1] if timed else default)
        # Another process may have written since.
        _known[file] = known = _read(file) | known
        _write(file, known)
    return dataclasses.replace(default, **known[key])


def neighbours(default: Any) -> list[Any]:
    """The configurations worth timing: each differs from the default in one or two things, and fits where that does."""
    changes: list[dict[str, int]] = [
        {},
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


def cache_file(device: torch.device) -> Path:
    """Where the results for a device are kept."""
    folder = Path(os.environ.get("MOESAIC_CACHE_DIR") or Path.home() / ".cache" / "moesaic")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name)
    return folder / f"triton-{slug}-triton{triton.__version__}-moesaic{version('moesaic')}.json"


def _time(run: Callable[[Any], object], config: Any, device: torch.device) -> float | None:
    """Seconds of the fastest of a few runs; None where the configuration does not fit the device."""
    try:
        run(config)  # compiles
    except triton.runtime.errors.OutOfResources:
        return None
    seconds = []
    for _ in range(_ROUNDS):
        _synchronize(device)
        start = time.perf_counter()
        run(config)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _write(file: Path, known: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A process that reads meanwhile sees the old file or the new one.
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known, indent=1, sort_keys=True))
    part.replace(file)
