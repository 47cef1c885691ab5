"""Low-rank adapters by the `peft` library, on attention and on experts, for a model on one process.

On several it cannot be: peft wraps the module that holds an expert parameter, and adds to it a product of plain tensors
(`ParamWrapper`, `_LoraFactorsProxy`), where a parallel plan needs that module itself and has made DTensors of its
parameters.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from moesaic.layers import MoE
from moesaic.train.architecture import ModelSource
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError


def check_adapters(config: TrainConfig, source: ModelSource, world_size: int) -> None:
    """Raise `UserError` if adapters are asked for where they cannot be."""
    if not config.lora_rank:
        return
    if not source.pretrained:
        raise UserError("--lora-rank adapts a pretrained model, but --model is a new one; leave one of them out")
    if world_size > 1:
        raise UserError(
            f"--lora-rank runs on one process, not {world_size}: peft's adapters are plain tensors, and experts over "
            "ranks are DTensors. Launch one process, or leave it out and tune all weights over the ranks"
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs the package peft: pip install 'moesaic[lora]'")


def add_adapters(model: nn.Module, config: TrainConfig) -> Any:
    """Put adapters into a model with our layers, in place, and freeze the rest of it.

    Gives back what takes them out again: `merge_and_unload()` adds them to the weights.
    """
    peft = importlib.import_module("peft")
    modules = dict(model.named_modules())
    attention = [
        name for name, module in modules.items() if ".self_attn." in f".{name}" and isinstance(module, nn.Linear)
    ]
    experts = [
        f"{name}.experts.{weight}"
        for name, module in modules.items()
        if isinstance(module, MoE)
        for weight in ("w1", "w3", "w2")
    ]
    if not attention and config.lora_on != "experts":
        raise UserError(f"--lora-on {config.lora_on}: {type(model).__name__} has no linear layers in a 'self_attn'")
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha_of(config),
        target_modules=[] if config.lora_on == "experts" else attention,
        target_parameters=None if config.lora_on == "attention" else experts,
    )
    torch.manual_seed(config.seed)
    return peft.LoraModel(model, settings, "default")


def alpha_of(config: TrainConfig) -> float:
    """`lora_alpha`, or twice the rank where it is not given."""
    return 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
