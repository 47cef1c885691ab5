"""The optimizer of a run, and the learning rate of each of its groups."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from moesaic.optim import Muon, param_groups
from moesaic.train.config import TrainConfig
from moesaic.train.schedule import learning_rate


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW, or Muon and AdamW, with weight decay on matrices only: not on norms, nor on the experts' biases.

    AdamW is fused: one operation for all parameters of a mesh instead of a dozen for each.
    """
    assert config.lr is not None
    assert config.weight_decay is not None
    if config.optimizer == "adamw":
        groups = param_groups(model, adamw=[model])
        return AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, fused=True)
    return Muon(
        param_groups(model),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        ns_steps=config.muon_steps,
        adjust_lr_fn=config.muon_adjust_lr,
        ns_dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[config.muon_dtype],
        betas=config.betas,
    )


def set_learning_rates(optimizer: Optimizer, step: int, config: TrainConfig) -> None:
    """Give each group its learning rate of step `step` (from 0). Muon's follows the same schedule to its own peak."""
    assert config.lr is not None
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        own = config.muon_lr if group["algorithm"] == "muon" else None
        group["lr"] = rate if own is None else rate * own / config.lr
