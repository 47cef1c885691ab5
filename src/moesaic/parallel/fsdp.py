"""Fully sharded data parallelism: dense parameters over dp and cp, expert parameters over edp, gradients summed."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from moesaic.layers import GroupedExperts
from moesaic.parallel.mesh import Meshes

_SELECTIVE = (_CachedTorchDispatchMode, _CachingTorchDispatchMode)


def shard_data_parallel(model: nn.Module, blocks: Sequence[nn.Module], meshes: Meshes, reshards: bool = True) -> None:
    """Apply FSDP2 to ``blocks`` and to ``model`` around them.

    Each ``GroupedExperts`` is sharded over edp on its own, the rest over dp and cp; an axis of size 1 is left alone.
    Modules with parameters of another dtype are sharded on their own, too. Experts that do not divide by ep are cut
    along the model dim: of a dim that ep cuts unevenly, torch's checkpoints take a rank's part for that of another.
    ``reshards``: whether gathered weights go after the forward pass of their module; those of the root never do.
    """
    shard = partial(_shard, reshards=reshards)
    experts = [m for m in model.modules() if isinstance(m, GroupedExperts)]
    if meshes.layout.edp > 1:
        for module in experts:
            uneven = module.num_experts % meshes.layout.ep != 0
            shard(module, meshes.expert["edp"], dims=partial(_uncut_dim, ranks=meshes.layout.edp) if uneven else None)
    if meshes.has_own_tokens:
        # Experts are data-parallel over other ranks than the layer they are in, even where edp is 1.
        ignored = {p for module in experts for p in module.parameters()}
        mesh = meshes.fsdp_mesh()
        for module in dict.fromkeys([*_of_another_dtype(model, ignored), *blocks, model]):
            shard(module, mesh, ignored)


def _of_another_dtype(model: nn.Module, ignored: set[nn.Parameter]) -> list[nn.Module]:
    """Modules whose own parameters differ in dtype from most of the model's: FSDP gathers parameters of one dtype.

    transformers keeps the router of some families in fp32, whatever the model is in.
    """
    sizes: Counter[torch.dtype] = Counter()
    for parameter in set(model.parameters()) - ignored:
        sizes[parameter.dtype] += parameter.numel()
    common = max(sizes, key=lambda dtype: sizes[dtype])
    own = {module: set(module.parameters(recurse=False)) - ignored for module in model.modules()}
    return [module for module, parameters in own.items() if any(p.dtype != common for p in parameters)]


def _uncut_dim(weight: nn.Parameter, ranks: int) -> Shard:
    """The dim of an expert weight that neither ep nor etp cuts: the model dim. Of a factor, its rank or the same."""
    assert isinstance(weight, DTensor)
    cut = {p.dim for p in weight.placements if isinstance(p, Shard)}
    return Shard(next(dim for dim in range(weight.ndim) if dim not in cut and weight.shape[dim] % ranks == 0))


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    ignored: set[nn.Parameter] | None = None,
    dims: Callable[[nn.Parameter], Shard] | None = None,
    *,
    reshards: bool,
) -> None:
    wrapped = fully_shard(
        module,
        mesh=mesh,
        ignored_params=ignored,
        shard_placement_fn=dims,
        reshard_after_forward=None if reshards else False,
    )
    assert isinstance(wrapped, FSDPModule)
    # The loss is divided once, by the number of tokens of all ranks: gradients are sums.
    wrapped.set_gradient_divide_factor(1.0)
    wrapped.set_force_sum_reduction_for_comms(True)
    _hide_from_selective_checkpointing(module)


def _hide_from_selective_checkpointing(module: nn.Module) -> None:
    """Let selective activation checkpointing see the module's operators and not those of FSDP's hooks around it.

    It takes an operator's n-th call in the second forward for the n-th of the first, and in the second FSDP gathers
    only what is not there.
    """
    run_unseen = torch.compiler.disable(
        _run_unseen,
        reason="FSDP's hooks run between compiled parts; leave out fullgraph, or have edp 1 (ep * etp of all ranks), "
        "so that FSDP does not shard the experts inside a layer",
    )
    state = getattr(fully_shard, "state")(module)  # noqa: B009 -- its type does not say that it has one
    both: list[dict[int, Callable[..., Any]]] = [module._forward_pre_hooks, module._forward_hooks]
    for hooks in both:
        for number, hook in hooks.items():
            if getattr(hook, "__self__", None) is state:
                hooks[number] = partial(run_unseen, hook)


def _run_unseen(hook: Callable[..., Any], *args: Any) -> Any:
    seen = any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())
    with _disable_current_modes() if seen else nullcontext():
        return hook(*args)
