"""moesaic: mixture-of-experts layers tiled over a device mesh.

Operators (:func:`grouped_mm`, :func:`experts_mlp`), sharding rules that make an operator DTensor-aware in one line
(:func:`sharding_rule`) and their proof (:func:`prove`), layers (:class:`MoE`), and plans that lay them over ranks
(:func:`parallelize`).

Operators are there at once. All other names are imported when they are first used, and DTensor with them. More names
are in :mod:`moesaic.ops`, :mod:`moesaic.layers` and the other packages; docs/api.md lists them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moesaic import on_demand
from moesaic.ops import experts_mlp, grouped_mm

if TYPE_CHECKING:
    from moesaic.layers import GroupedExperts, MoE, MoEConfig, TopKRouter, balance_losses, expert_load
    from moesaic.layers import update_expert_bias as update_expert_bias
    from moesaic.ops import debug_checks as debug_checks
    from moesaic.parallel import build_meshes, clip_grad_norm_, parallelize
    from moesaic.sharding import ShardingError, prove, sharding_rule

    __version__: str

__all__ = [
    "GroupedExperts",
    "MoE",
    "MoEConfig",
    "ShardingError",
    "TopKRouter",
    "balance_losses",
    "build_meshes",
    "clip_grad_norm_",
    "expert_load",
    "experts_mlp",
    "grouped_mm",
    "parallelize",
    "prove",
    "sharding_rule",
    "update_expert_bias",
]

_PLACES = {
    "GroupedExperts": "moesaic.layers",
    "MoE": "moesaic.layers",
    "MoEConfig": "moesaic.layers",
    "ShardingError": "moesaic.sharding",
    "TopKRouter": "moesaic.layers",
    "balance_losses": "moesaic.layers",
    "build_meshes": "moesaic.parallel",
    "clip_grad_norm_": "moesaic.parallel",
    "debug_checks": "moesaic.ops",  # was public here
    "expert_load": "moesaic.layers",
    "parallelize": "moesaic.parallel",
    "prove": "moesaic.sharding",
    "sharding_rule": "moesaic.sharding",
    "update_expert_bias": "moesaic.layers",
}
_PACKAGES = ("checkpoint", "integrations", "layers", "optim", "parallel", "routing", "sharding", "testing", "train")


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"moesaic.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("moesaic")
    else:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, *_PACKAGES, "__version__"})


on_demand.arrange()
