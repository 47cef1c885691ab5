"""What devices and links can do: tables in ``hardware.toml``, or a file of the user's own."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from moesaic.train.flops import PEAKS

# How many times as long as an exchange of as many bytes a collective takes, by its kind.
SAME_AS_DIRECT = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 1.0}


@dataclass(frozen=True)
class Link:
    """What one device sends, in one direction: bytes a second, and seconds until a collective begins."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Hardware:
    """A device and its links. ``hardware.toml`` says what the numbers are and where they are from."""

    name: str
    memory: float
    flops: Mapping[str, float]
    efficiency: float
    grouped_efficiency: float
    half_rows: float
    bandwidth: float
    memory_efficiency: float
    node: Link
    network: Link
    layer: float = 0.0
    overlap: float = 1.0
    alone: float = 1.0
    slower: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(SAME_AS_DIRECT))

    def beside(self, first: int | float, second: int | float) -> float:
        """Seconds of two things that may run at the same time, as far as they do here."""
        return max(first, second) + (1 - self.overlap) * min(first, second)

    def matmul_seconds(self, flops: int | float, dtype: str) -> float:
        """Of products of large matrices."""
        return flops / (self.flops[dtype] * self.efficiency)

    def grouped_seconds(self, flops: int | float, dtype: str, rows: int | float) -> float:
        """Of grouped products with ``rows`` rows a group: few rows do not fill the device."""
        return flops / (self.flops[dtype] * self.grouped_efficiency * rows / (rows + self.half_rows)) if rows else 0.0

    def memory_seconds(self, bytes_moved: int | float) -> float:
        return bytes_moved / (self.bandwidth * self.memory_efficiency)


def known() -> list[str]:
    """The names of the devices that the package knows."""
    return list(_tables())


def read_hardware(name: str) -> Hardware:
    """A device by its name, in any case, or from a TOML or JSON file.

    Raises:
        ValueError: there is neither, or the file lacks a number or has one that cannot be.
    """
    tables = _tables()
    by_case = {known.lower(): known for known in tables}
    if name.lower() in by_case:
        return _hardware(by_case[name.lower()], tables[by_case[name.lower()]], "hardware.toml")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"--hardware {name}: this is no file, and no known device; choose from {', '.join(tables)}")
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"--hardware {name}: {error}") from error
    return _hardware(path.stem, values, f"--hardware {name}")


def as_toml(hardware: Hardware) -> str:
    """The text of a file that :func:`read_hardware` reads."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{ " + ", ".join(f"{key} = {text(v)}" for key, v in value.items()) + " }"
        return f"{float(value):.6g}"

    values = dataclasses.asdict(hardware)
    return "".join(f"{key} = {text(value)}\n" for key, value in values.items() if key != "name")


def _tables() -> dict[str, dict[str, Any]]:
    tables = tomllib.loads(files("moesaic.plan").joinpath("hardware.toml").read_text())
    for name, values in tables.items():
        # A run and a plan count with the same peak.
        if name in PEAKS:
            values["flops"]["bf16"] = PEAKS[name] * 1e12
    return tables


def _hardware(name: str, values: Mapping[str, Any], where: str) -> Hardware:
    fields = {field.name: field for field in dataclasses.fields(Hardware) if field.name != "name"}
    names, given = list(fields), [name for name in fields if name in values]
    optional = ("layer", "overlap", "alone", "slower")
    if missing := [key for key in names if key not in values and key not in optional]:
        raise ValueError(f"{where}: {', '.join(missing)} missing; it needs {', '.join(names)}")
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{where}: nothing is known about {', '.join(unknown)}; it may have {', '.join(names)}")

    def number(key: str, value: Any) -> float:
        least = {"layer": 0.0, "overlap": 0.0, "alone": 1.0}.get(key)
        what = "a number above 0" if least is None else f"a number of at least {least:g}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not (value > 0 if least is None else value >= least):
            raise ValueError(f"{where}: {key} must be {what}, got {value!r}")
        if key == "overlap" and value > 1:
            raise ValueError(f"{where}: overlap must be a number of at most 1, got {value!r}")
        return float(value)

    def table(key: str, needed: tuple[str, ...]) -> dict[str, float]:
        value = values[key]
        if not isinstance(value, Mapping) or set(value) != set(needed):
            raise ValueError(f"{where}: {key} must be a table of {' and '.join(needed)}, got {value!r}")
        return {name: number(f"{key}.{name}", value[name]) for name in needed}

    tables: dict[str, Any] = {
        "flops": table("flops", ("bf16", "fp32")),
        "node": Link(**table("node", ("bandwidth", "latency"))),
        "network": Link(**table("network", ("bandwidth", "latency"))),
    }
    if "slower" in values:
        tables["slower"] = table("slower", tuple(SAME_AS_DIRECT))
    plain: dict[str, Any] = {key: number(key, values[key]) for key in given if key not in tables}
    return Hardware(name, **plain, **tables)
