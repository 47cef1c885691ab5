"""Which parameters get weight decay, and which learning rate."""

from pathlib import Path

import pytest
from torch import nn

from moesaic.layers.experts import GroupedExperts
from moesaic.train.config import TrainConfig
from moesaic.train.optimizer import build_optimizer, set_learning_rates


def test_matrices_and_no_biases_get_weight_decay():
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "experts": GroupedExperts(4, 8, 16, biases=True)})
    config = TrainConfig(data="", model="", out=Path("run"), lr=1e-3, weight_decay=0.1)
    decay = {
        id(p): group["weight_decay"] for group in build_optimizer(model, config).param_groups for p in group["params"]
    }
    decayed = {name for name, parameter in model.named_parameters() if decay[id(parameter)]}
    assert decayed == {"linear.weight", "experts.w1", "experts.w3", "experts.w2"}


def test_muon_has_a_peak_of_its_own():
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "experts": GroupedExperts(4, 8, 16)})
    config = TrainConfig(lr=1e-3, weight_decay=0.1, steps=10, warmup_steps=3, optimizer="muon", muon_lr=0.02)
    optimizer = build_optimizer(model, config)
    for step in range(10):
        set_learning_rates(optimizer, step, config)
        rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
        assert rates["muon"] == pytest.approx(20 * rates["adamw"])
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(model["linear"].weight),
        *map(id, model["experts"].parameters()),
    }
