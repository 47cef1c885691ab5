"""moesaic: mixture-of-experts layers tiled over a device mesh.

Operators (:func:`grouped_mm`, :func:`experts_mlp`), sharding rules that make an operator DTensor-aware in one line
(:func:`sharding_rule`) and their proof (:func:`prove`), layers (:class:`MoE`), and plans that lay them over ranks
(:func:`parallelize`).
"""

from moesaic.layers import GroupedExperts, MoE, MoEConfig, TopKRouter, balance_losses
from moesaic.ops import debug_checks, experts_mlp, grouped_mm
from moesaic.parallel import build_meshes, clip_grad_norm_, parallelize
from moesaic.sharding import ShardingError, prove, sharding_rule

__all__ = [
    "GroupedExperts",
    "MoE",
    "MoEConfig",
    "ShardingError",
    "TopKRouter",
    "balance_losses",
    "build_meshes",
    "clip_grad_norm_",
    "debug_checks",
    "experts_mlp",
    "grouped_mm",
    "parallelize",
    "prove",
    "sharding_rule",
]
