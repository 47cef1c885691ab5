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

from moesaic.parallel.split import Stages, names_in_whole

_STATE, _GROUPS = "state", "param_groups"


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Parameters, persistent buffers and optimizer state, on whatever mesh each lives.

    Names and global shapes do not depend on the layout. Learning rate and the like are left out: they are settings of
    the run and not state. An optimizer that has not made a step yet gets its state here, and is not to be saved.
    """
    names, of_optimizer = _names(model)
    optimizer_state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    return {
        "model": _renamed(get_model_state_dict(model), names),
        "optimizer": _renamed(optimizer_state[_STATE], of_optimizer),
    }


def restore(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put a state of `training_state`, filled by `load`, into the model and the optimizer."""
    restore_weights(model, state)
    _, of_optimizer = _names(model)
    current = get_optimizer_state_dict(model, optimizer)
    back = {theirs: ours for ours, theirs in of_optimizer.items()}
    own = _renamed(state["optimizer"], back)
    set_optimizer_state_dict(model, optimizer, {_STATE: own, _GROUPS: current[_GROUPS]})


def weights(model: nn.Module) -> dict[str, Any]:
    """The part of `training_state` that is the model's."""
    return {"model": _renamed(get_model_state_dict(model), _names(model)[0])}


def restore_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Put a state of `weights`, filled by `read_into`, into the model."""
    back = {theirs: ours for ours, theirs in _names(model)[0].items()}
    set_model_state_dict(model, _renamed(state["model"], back))


def _names(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """The names in the whole model of what the state of a model has, and of what that of its optimizer has.

    A weight that two stages share has one state of the optimizer, under the name of the first.
    """
    if not isinstance(model, Stages):
        return {}, {}
    names = names_in_whole(model)
    first = {} if model.shared is None else {model.shared[1]: model.shared[0]}
    return names, {ours: first.get(theirs, theirs) for ours, theirs in names.items()}


def _renamed(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in state.items()}
