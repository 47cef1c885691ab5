"""The two steps in which :func:`load_pretrained` puts adapters on a model: before it has memory, and after."""

from pathlib import Path
from typing import Any

import peft
from torch import nn

from moesaic.integrations.peft.add import add_adapters, reset_adapters
from moesaic.integrations.peft.files import fill_adapters, read_config

_NAME = "default"


def prepare_adapters(model: nn.Module, adapter: Any) -> None:
    """Put adapters without numbers on a model on the meta device.

    Raises:
        TypeError: ``adapter`` is neither a ``LoraConfig`` nor a path.
        ValueError, OSError: see :func:`add_adapters` and :func:`load_adapters`.
    """
    if not isinstance(adapter, peft.LoraConfig | str | Path):
        raise TypeError(f"adapter: expected a peft.LoraConfig or a folder, got {type(adapter).__name__}")
    config = adapter if isinstance(adapter, peft.LoraConfig) else read_config(adapter)
    add_adapters(model, config, _NAME)


def finish_adapters(model: nn.Module, adapter: Any, seed: int = 0) -> None:
    """Give the adapters their numbers. Collective if they are in a folder."""
    if isinstance(adapter, peft.LoraConfig):
        reset_adapters(model, _NAME, seed)
    else:
        fill_adapters(model, adapter, _NAME)
