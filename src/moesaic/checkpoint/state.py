"""The tensors of a model and its optimizer, by parameter name: what a checkpoint holds."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

_STATE, _GROUPS = "state", "param_groups"


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Parameters, persistent buffers and optimizer state, on whatever mesh each lives.

    Names and global shapes do not depend on the layout. Learning rate and the like are left out: they are settings of
    the run and not state. An optimizer that has not made a step yet gets its state here, and is not to be saved.
    """
    optimizer_state = get_optimizer_state_dict(model, optimizer)
    return {"model": get_model_state_dict(model), "optimizer": optimizer_state[_STATE]}


def restore(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put a state of `training_state`, filled by `load`, into the model and the optimizer."""
    set_model_state_dict(model, state["model"])
    current = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, {_STATE: state["optimizer"], _GROUPS: current[_GROUPS]})


def weights(model: nn.Module) -> dict[str, Any]:
    """The part of `training_state` that is the model's."""
    return {"model": get_model_state_dict(model)}


def restore_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Put a state of `weights`, filled by `read_into`, into the model."""
    set_model_state_dict(model, state["model"])
