"""Mixture-of-experts layers. They know nothing of meshes."""

from moesaic.layers.attach import attach_balance_losses
from moesaic.layers.balance import balance_losses
from moesaic.layers.config import MoEConfig
from moesaic.layers.dispatch import Dispatched, Dispatcher, LocalDispatcher
from moesaic.layers.experts import GroupedExperts
from moesaic.layers.initial import init_weights_
from moesaic.layers.load import expert_load, reset_expert_load, update_expert_bias
from moesaic.layers.moe import MoE
from moesaic.layers.quantized import quantize_
from moesaic.layers.router import Routing, TopKRouter
from moesaic.layers.uncounted import uncounted

__all__ = [
    "Dispatched",
    "Dispatcher",
    "GroupedExperts",
    "LocalDispatcher",
    "MoE",
    "MoEConfig",
    "Routing",
    "TopKRouter",
    "attach_balance_losses",
    "balance_losses",
    "expert_load",
    "init_weights_",
    "quantize_",
    "reset_expert_load",
    "uncounted",
    "update_expert_bias",
]
