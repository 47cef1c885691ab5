"""Model config files, as plain JSON: transformers is not needed to read one, or to see that a layout fits it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from moesaic.parallel.fit import expert_misfit
from moesaic.parallel.mesh import MeshLayout
from moesaic.train.config import flag
from moesaic.train.errors import UserError


def read_model_config(name: str) -> dict[str, Any]:
    """The JSON of a model config: of this package by name, or a config.json, or the folder it is in."""
    packaged = resources.files("moesaic.train").joinpath("configs")
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    try:
        if path.is_file():
            text = path.read_text()
        elif (file := packaged.joinpath(f"{name}.json")).is_file():
            text = file.read_text()
        else:
            names = sorted(file.name.removesuffix(".json") for file in packaged.iterdir())
            raise UserError(f"--model {name}: no such file, and this package has only {', '.join(names)}")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: cannot read {path}: {error}") from error
    missing = [key for key in ("model_type", "vocab_size") if key not in values]
    if not isinstance(values, dict) or missing:
        raise UserError(f"--model {name} is not a model config: it has no {' and no '.join(missing)}")
    return values


def check_fits(values: dict[str, Any], layout: MeshLayout) -> None:
    """Raise `UserError` if the model cannot be divided as the layout says."""
    rules = [
        ("num_attention_heads", "tp", layout.tp),
        ("num_key_value_heads", "tp", layout.tp),
    ]
    for key, axis, size in rules:
        count = values.get(key)
        if count is not None and count % size:
            choices = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise UserError(f"{flag(axis)} {size} does not divide the model's {key}, {count}; what does: {choices}")
    experts, hidden_dim, dim = (values.get(key) for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
    if experts and hidden_dim and dim and (misfit := expert_misfit(experts, hidden_dim, dim, layout)):
        legal = ", ".join(map(str, misfit.legal))
        raise UserError(f"{flag(misfit.axis)}: {misfit.problem}; what fits: {legal}")
