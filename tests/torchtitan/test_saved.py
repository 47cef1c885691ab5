"""torchtitan's selective activation checkpointing computes our products once, and the rest again."""

import collections
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("torchtitan")

titan = importlib.import_module("moesaic.integrations.torchtitan")


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


class Block(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = config.build()
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter)

    def forward(self, *args):
        return self.experts(*args).sin()


@pytest.mark.parametrize("override", ["experts", "routed_experts"])
def test_products_are_saved(override):
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    config = GroupedExperts.Config(dim=8, hidden_dim=6, num_experts=4)
    if override == "experts":
        config, product = titan.experts(config), torch.ops.moesaic.grouped_mm.default
        args = (torch.randn(5, 8, requires_grad=True), torch.tensor([2, 0, 1, 2]))
    else:
        dispatcher = AllToAllTokenDispatcher.Config(num_experts=4, top_k=2)
        config = titan.routed_experts(RoutedExperts.Config(inner_experts=config, token_dispatcher=dispatcher))
        product = torch.ops.moesaic.experts_mlp.default
        weights, ids = torch.rand(1, 5, 4).topk(2)
        args = (torch.randn(1, 5, 8, requires_grad=True), weights, ids, torch.zeros(4))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({"0": Block(config)})
    SelectiveAC(SelectiveAC.Config(force_recompute_mm_shapes_by_fqns=[])).apply(model)
    with Calls() as calls:
        model.layers["0"](*args).sum().backward()
    assert calls.count[product] == {"experts": 3, "routed_experts": 1}[override]
    assert calls.count[torch.ops.aten.sin.default] == 2
