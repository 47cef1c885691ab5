"""What --model names: a shape to train from scratch, or a pretrained model.

Configs are read as plain JSON: transformers is not needed for that, or to see that a layout fits.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moesaic.ops.arguments import divisors
from moesaic.parallel.fit import expert_misfit
from moesaic.parallel.mesh import MeshLayout
from moesaic.train.config import flag
from moesaic.train.errors import UserError, first_line
from moesaic.train.hub import check_is_name, check_on_hub
from moesaic.train.textfiles import UnreadableError, kind_of, shown

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.gguf")


@dataclass(frozen=True)
class ModelSource:
    """A model config, and where the weights are if the model is pretrained."""

    values: dict[str, Any]
    """Of its config.json."""
    weights: str | None
    """A folder, or a name on the hub; None for a new model."""

    @property
    def pretrained(self) -> bool:
        """Whether there are weights to begin with."""
        return self.weights is not None

    @property
    def stored(self) -> str | None:
        """The format in which the files have quantised weights, such as "mxfp4" of gpt-oss; None for plain ones."""
        if not self.pretrained or not (quantized := self.values.get("quantization_config")):
            return None
        return str(quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized)

    @property
    def text_values(self) -> dict[str, Any]:
        """Of the language model, where it is a part of the whole."""
        return self.values.get("text_config") or self.values


def find_model(name: str) -> ModelSource:
    """What `--model name` means: a config of this package, a config.json, a folder, or a name on the hub.

    A folder with safetensors beside its config.json is a pretrained model, one without is a shape. Raises `UserError`
    if it is neither, or one that cannot be trained.
    """
    try:
        path = Path(name).expanduser()
        kind = kind_of(path)
    except (RuntimeError, UnreadableError) as error:
        raise UserError(f"--model {shown(name)}: {error}") from error
    packaged = resources.files("moesaic.train").joinpath("configs")
    if kind == "a folder":
        found = ModelSource(_read(name, path / "config.json"), str(path) if _has_weights(name, path) else None)
    elif kind is not None:
        found = ModelSource(_read(name, path), None)
    elif (file := packaged.joinpath(f"{name}.json")).is_file():
        found = ModelSource(_parse(name, file.read_text()), None)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        found = ModelSource(_read(name, _from_hub(name)), name)
    else:
        names = sorted(file.name.removesuffix(".json") for file in packaged.iterdir())
        raise UserError(f"--model {name}: no such file or folder, and this package has only {', '.join(names)}")
    missing = [key for key in ("model_type", "vocab_size") if key not in found.values | found.text_values]
    if missing:
        raise UserError(f"--model {name} is not a model config: it has no {' and no '.join(missing)}")
    if found.stored not in (None, "mxfp4"):
        raise UserError(
            f"--model {name}: its weights are quantized ({found.stored}), which cannot be trained; give a bf16 or fp32 "
            "version"
        )
    return found


def check_fits(values: dict[str, Any], layout: MeshLayout) -> None:
    """Raise `UserError` if the model cannot be divided as the layout says."""
    rules = [
        ("num_attention_heads", "tp", layout.tp),
        ("num_key_value_heads", "tp", layout.tp),
    ]
    for key, axis, size in rules:
        count = values.get(key)
        if count is not None and count % size:
            choices = ", ".join(map(str, divisors(count)))
            raise UserError(f"{flag(axis)} {size} does not divide the model's {key}, {count}; what does: {choices}")
    experts, hidden_dim, dim = (values.get(key) for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
    if experts and hidden_dim and dim and (misfit := expert_misfit(experts, hidden_dim, dim, layout)):
        legal = ", ".join(map(str, misfit.legal))
        raise UserError(f"{flag(misfit.axis)}: {misfit.problem}; what fits: {legal}")


def _has_weights(name: str, folder: Path) -> bool:
    if any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return True
    others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    if others:
        raise UserError(
            f"--model {name}: its weights ({others[0]}) are not safetensors; load them with transformers and write "
            "them with save_pretrained. To train a new model of this shape give its config.json"
        )
    return False


def _from_hub(name: str) -> Path:
    from transformers.utils import cached_file

    check_is_name("--model", name)
    check_on_hub("--model", name, "model")
    try:
        return Path(str(cached_file(name, "config.json")))
    except Exception as error:
        raise UserError(
            f"--model {name}: there is no such folder, and it cannot be had from the hub: {first_line(error)}"
        ) from error


def _read(name: str, path: Path) -> dict[str, Any]:
    try:
        return _parse(name, path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: cannot read {path}: {error}") from error


def _parse(name: str, text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise UserError(f"--model {name} is not a model config: it is no JSON object")
    return values
