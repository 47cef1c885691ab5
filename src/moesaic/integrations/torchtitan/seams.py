"""What this integration expects of torch and torchtitan. It asks for the parts, not for version numbers.

torchtitan changes between releases without notice. A part that has another form would fail late, or train otherwise
and say nothing.
"""

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

_MOE = "torchtitan.models.common.moe"
_PARALLEL_DIMS = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "spmd_backend")


class Seam(NamedTuple):
    """A part of torchtitan.

    Attributes:
        module, name: where it is.
        has: the parameters of a function, all of them; some fields of a dataclass.
    """

    module: str
    name: str
    has: tuple[str, ...] = ()


SEAMS = (
    Seam("spmd_types", "is_type_checking", ()),
    Seam("torchtitan.components.lora", "_make_frozen_config", ("cfg",)),
    Seam("torchtitan.components.lora", "_get_lora_cls", ("parent_cls",)),
    Seam("torchtitan.config", "derive", ("source", "target_cls", "deltas")),
    Seam("torchtitan.config", "override", ("target", "fqns", "description", "exact")),
    Seam("torchtitan.distributed", "ParallelDims", _PARALLEL_DIMS),
    Seam(
        "torchtitan.distributed.parallel_dims",
        "ParallelDims.get_optional_mesh",
        ("self", "dims", "include_singleton_axes"),
    ),
    Seam("torchtitan.distributed.parallel_dims", "ParallelDims.get_dense_tp_mesh", ("self",)),
    Seam("torchtitan.distributed.activation_checkpoint", "SelectiveAC.get_save_ops", ("self",)),
    Seam("torchtitan.models.common.token_dispatcher", "AllToAllTokenDispatcher.Config", ("num_experts", "top_k")),
    Seam(_MOE, "GroupedExperts.Config", ("dim", "hidden_dim", "num_experts", "param_init", "sharding_config")),
    Seam(_MOE, "GroupedExperts.forward", ("self", "x_RD", "num_tokens_per_expert_E")),
    Seam(_MOE, "GroupedExperts.parallelize", ("self", "parallel_dims")),
    Seam(_MOE, "RoutedExperts.Config", ("inner_experts", "token_dispatcher", "sharding_config")),
    Seam(
        _MOE,
        "RoutedExperts.forward",
        ("self", "x_BLD", "topk_scores_BLK", "topk_expert_ids_BLK", "num_local_tokens_per_expert_E"),
    ),
    Seam(
        _MOE,
        "TokenChoiceTopKRouter.Config",
        (
            "num_experts",
            "gate",
            "num_expert_groups",
            "num_limited_groups",
            "top_k",
            "score_func",
            "route_norm",
            "route_scale",
            "_debug_force_load_balance",
        ),
    ),
    Seam(_MOE, "TokenChoiceTopKRouter.forward", ("self", "x_BLD", "expert_bias_E")),
    Seam(_MOE, "MoE.Config", ("num_experts", "routed_experts", "router", "load_balance_coeff", "shared_experts")),
    Seam(_MOE, "MoE.forward", ("self", "x_BLD")),
    Seam("torchtitan.models.common.linear", "Linear.Config", ("in_features", "out_features", "bias")),
    Seam("torchtitan.protocols.sharding", "LocalMapConfig", ("in_grad_placements",)),
    Seam(
        "torchtitan.protocols.sharding",
        "ShardingConfig",
        ("state_shardings", "in_src_shardings", "in_dst_shardings", "out_src_shardings", "local_map"),
    ),
    Seam("torchtitan.models.gpt_oss.moe", "GptOssGroupedExperts.Config", ("swiglu_limit",)),
    Seam("torchtitan.models.gpt_oss.moe", "swiglu", ("x", "alpha", "limit")),
)

# What torchtitan asks of torch, though its own metadata asks for none.
TORCH_SEAMS = {
    "torch.distributed": "set_timeout",  # called after the first step
    "torch.distributed.fsdp": "DataParallelMeshDims",
}


def check_seams() -> None:
    """Raise ``ImportError`` unless torch and torchtitan have the parts that are used here, in the expected form."""
    try:
        titan = version("torchtitan")
    except ImportError as error:  # of which PackageNotFoundError is one
        raise ImportError(
            "moesaic.integrations.torchtitan needs torchtitan 0.3: pip install '.[torchtitan]' in a checkout of moesaic"
        ) from error
    lacking = [f"{m}.{name}" for m, name in TORCH_SEAMS.items() if not hasattr(import_module(m), name)]
    if lacking:
        raise ImportError(
            f"torchtitan {titan} needs {' and '.join(lacking)}, which torch {torch.__version__} has not; "
            "install torch 2.14 or newer"
        )
    other = list(_differences())
    if other:
        raise ImportError(
            f"moesaic.integrations.torchtitan is made for torchtitan 0.3.0, and torchtitan {titan} differs: "
            f"{'; '.join(other)}. Install torchtitan==0.3.0, or a moesaic that knows torchtitan {titan}"
        )


def _differences() -> Iterator[str]:
    for seam in SEAMS:
        path = f"{seam.module}.{seam.name}"
        try:
            found: Any = import_module(seam.module)
            for name in seam.name.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            yield f"{path} is not there ({error})"
            continue
        if is_dataclass(found):
            names = {f.name for f in fields(found)}
            if missing := [name for name in seam.has if name not in names]:
                yield f"{path} has no field {', '.join(missing)}"
        elif (got := tuple(inspect.signature(found).parameters)) != seam.has:
            yield f"{path} takes ({', '.join(got)}) and not ({', '.join(seam.has)})"
