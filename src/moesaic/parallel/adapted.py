"""Linear layers with low-rank adapters of peft. They are known by what they have, since peft is not imported here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moesaic.layers.dropout import Holders, KeyedDropout
from moesaic.parallel.collectives import all_gather
from moesaic.parallel.mesh import Meshes


def base_of(module: Any) -> Any:
    """The linear layer that adapters of peft are around, or else the module itself."""
    base = getattr(module, "base_layer", None)
    return base if isinstance(base, nn.Linear) and hasattr(module, "lora_A") else module


def factors(module: Any, name: str) -> list[nn.Parameter]:
    """The factors ``lora_A`` or ``lora_B`` of all adapters on a layer; none if it has no adapters."""
    return [] if base_of(module) is module else list(getattr(module, name).parameters())


def tensor_parallel_problem(module: Any) -> str | None:
    """Why the adapters on a layer cannot be split over ranks, if so."""
    if base_of(module) is module:
        return None
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.lora_dropout.values()):
        return (
            "has a dropout, which each rank would draw for itself; set lora_dropout to 0, or add adapters by "
            "moesaic.integrations.peft.add_adapters, of whose dropout each rank has its part"
        )
    if any(True for _ in module.lora_magnitude_vector.parameters()):
        return "normalizes whole columns of the weight (DoRA), of which a rank has a part; set use_dora to False"
    return None


def holders_of(meshes: Meshes) -> Holders:
    """All ranks, those that hold parts of the same sequences together."""
    everyone = meshes.all_ranks()
    return Holders(partial(_gather, group=everyone), everyone.rank(), meshes.sequence_parts, meshes.cp_size)


def share_dropout(model: nn.Module, holders: Holders) -> None:
    """Let each rank have its part of the masks of adapters on linear layers. See :class:`KeyedDropout`."""
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.holders = holders


def share_dropout_of_whole(layer: nn.Module, group: dist.ProcessGroup, *, of_heads: bool) -> None:
    """The same for a layer in an attention, which ranks of ``group``, those of tp, give all that they have together.

    With ``of_heads`` each of them has the columns of its heads.
    """
    for module in layer.modules():
        if isinstance(module, KeyedDropout):
            everyone, tp = module.holders, group.size()
            gather = partial(_one_of_each, everyone.gather, tp)
            module.holders = Holders(gather, everyone.rank // tp, everyone.parts // tp, everyone.cp)
            if of_heads:
                linear: Any = base_of(layer)
                module.first = linear.in_features // tp * group.rank()


def _gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_gather(t.unsqueeze(0), group)


def _one_of_each(gather: Callable[[Tensor], Tensor], parts: int, t: Tensor) -> Tensor:
    return gather(t)[::parts]
