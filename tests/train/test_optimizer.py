"""Which parameters get weight decay."""

from pathlib import Path

from torch import nn

from moesaic.layers.experts import GroupedExperts
from moesaic.train.config import TrainConfig
from moesaic.train.model import build_optimizer


def test_matrices_and_no_biases_get_weight_decay():
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "experts": GroupedExperts(4, 8, 16, biases=True)})
    config = TrainConfig(data="", model="", out=Path("run"), lr=1e-3, weight_decay=0.1)
    decay = {
        id(p): group["weight_decay"] for group in build_optimizer(model, config).param_groups for p in group["params"]
    }
    decayed = {name for name, parameter in model.named_parameters() if decay[id(parameter)]}
    assert decayed == {"linear.weight", "experts.w1", "experts.w3", "experts.w2"}
