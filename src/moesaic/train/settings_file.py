"""Settings in a file: YAML, TOML, or the config.json of a run. They become arguments, before those of the call."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import tomllib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moesaic.options import parse
from moesaic.train.config import TrainConfig, flag
from moesaic.train.errors import UserError, first_line

# Up to each call, and what only makes sense for one run.
_OF_THE_CALL = ("config", "resume", "choose_again")


def arguments_in(path: Path) -> list[str]:
    """The settings of a file as arguments of `moesaic train`. Raises `UserError` that names the file and the setting.

    A file is an object of names and values, as in `seq_len: 256`. Names may be written with hyphens. A null leaves
    the default. The config.json of a run has its settings below "settings"; its run folder is not taken.
    """
    values = _read(path)
    if isinstance(of_run := values.get("settings"), dict):
        values = {name: value for name, value in of_run.items() if name != "out"}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for name, value in values.items():
        if name in _OF_THE_CALL:
            raise UserError(f"--config {path}: {name} is for the command line: give {flag(name)} there")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; moesaic train --help lists all"
            raise UserError(f"--config {path}: there is no setting {name!r}{hint}")
        if isinstance(value, dict):
            raise UserError(f"--config {path}: {name} must be a value and not a section; write all settings at the top")
    arguments = {name: _arguments(name, value) for name, value in values.items() if value is not None}
    everything = [argument for some in arguments.values() for argument in some]
    if not _is_taken(everything):
        wrong = next((name for name, some in arguments.items() if not _is_taken(some)), None)
        what = "its settings do not go together" if wrong is None else f"{wrong} cannot be {values[wrong]!r}"
        raise UserError(f"--config {path}: {what}; moesaic train --help says what {flag(wrong or 'config')} takes")
    return everything


def _read(path: Path) -> dict[str, Any]:
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": _from_yaml,
        ".yml": _from_yaml,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--config {path}: the name must end in .yaml, .toml or .json, which says what is in it")
    try:
        values = reader(path.expanduser().read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # of yaml, which is optional
        raise UserError(f"--config {path} cannot be read: {first_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"--config {path}: expected names and values, such as seq_len: 256, got {type(values).__name__}"
        )
    return values


def _from_yaml(text: str) -> Any:
    if importlib.util.find_spec("yaml") is None:
        raise UserError("--config: YAML needs the package pyyaml: pip install pyyaml; or write the file in TOML")
    return importlib.import_module("yaml").safe_load(text)


def _arguments(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if isinstance(value, list):
        return [flag(name), *map(str, value)]
    # Together, for a value may begin with a hyphen.
    return [f"{flag(name)}={value}"]


def _is_taken(arguments: list[str]) -> bool:
    try:
        parse(TrainConfig, "train", arguments, speak=False)
    except SystemExit:
        return False
    return True
