"""Fully sharded data parallelism: dense parameters over dp, expert parameters over edp, gradients summed."""

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moesaic.layers import GroupedExperts
from moesaic.parallel.mesh import Meshes


def shard_data_parallel(model: nn.Module, blocks: Sequence[nn.Module], meshes: Meshes) -> None:
    """Apply FSDP2 to ``blocks`` and to ``model`` around them.

    Each ``GroupedExperts`` is sharded over edp on its own, the rest over dp; an axis of size 1 is left alone.
    """
    experts = [m for m in model.modules() if isinstance(m, GroupedExperts)]
    if meshes.layout.edp > 1 and meshes.expert is not None:
        for module in experts:
            _shard(module, meshes.expert["edp"])
    if meshes.dp_size > 1 and meshes.dense is not None:
        # Experts are data-parallel over other ranks than the layer they are in, even where edp is 1.
        ignored = {p for module in experts for p in module.parameters()}
        axes = ("dp_replicate", "dp_shard") if meshes.layout.dp_replicate > 1 else ("dp_shard",)
        for module in dict.fromkeys([*blocks, model]):
            _shard(module, meshes.dense[axes], ignored)


def _shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> None:
    wrapped = fully_shard(module, mesh=mesh, ignored_params=ignored)
    assert isinstance(wrapped, FSDPModule)
    # The loss is divided once, by the number of tokens of all ranks: gradients are sums.
    wrapped.set_gradient_divide_factor(1.0)
    wrapped.set_force_sum_reduction_for_comms(True)
