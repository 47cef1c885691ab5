"""What devices and links can do: tables in ``hardware.toml``, or a file of the user's own."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any


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
    return tomllib.loads(files("moesaic.plan").joinpath("hardware.toml").read_text())


def _hardware(name: str, values: Mapping[str, Any], where: str) -> Hardware:
    names = [field.name for field in dataclasses.fields(Hardware) if field.name != "name"]
    if missing := [key for key in names if key not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} missing; it needs {', '.join(names)}")
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{where}: nothing is known about {', '.join(unknown)}; it may have {', '.join(names)}")

    def number(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{where}: {key} must be a number above 0, got {value!r}")
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
    plain: dict[str, Any] = {key: number(key, values[key]) for key in names if key not in tables}
    return Hardware(name, **plain, **tables)
