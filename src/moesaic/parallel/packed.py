"""Quantised weights of experts on the (ep, etp) mesh: cut as other weights are, but never within a block."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moesaic.layers.packed import PackedWeight
from moesaic.ops.quantized import FORMATS, QuantizedWeight
from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.placements import places_of_quantized


def packed_weights(experts: nn.Module) -> dict[str, PackedWeight]:
    """The quantised weights by name; nothing if the experts are not quantised."""
    return {name: child for name, child in experts.named_children() if isinstance(child, PackedWeight)}


def check_packed(name: str, experts: nn.Module, layout: MeshLayout, local: bool) -> None:
    """Raise ``ValueError`` if a rank would have a part of a block of a quantised weight."""
    if layout.ep * layout.etp * layout.edp == 1:
        return
    for weight, packed in packed_weights(experts).items():
        block, format = FORMATS[packed.format].block, packed.format
        inputs = packed.shape[1]
        if packed.flat_sizes is not None and (layout.etp > 1 or not local):
            what = "only whole experts can be cut" if layout.etp > 1 else "no rule lays them over a mesh"
            raise ValueError(
                f"model: '{name}.{weight}' has blocks of {block} ({format}) that run over the ends of rows of "
                f"{inputs}, so {what}; use etp 1 and compute='local', sizes that {block} divides, or 'int8'"
            )
        if block is not None and weight == "w2" and inputs // block % layout.etp:
            raise ValueError(
                f"etp: {layout.etp} ranks cannot share evenly the {inputs // block} blocks of {block} ({format}) in "
                f"the hidden dim {inputs} of '{name}.{weight}', and no block is split; choose etp to divide "
                f"{inputs // block}, or 'int8'"
            )


def distribute_packed(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Make data and scales DTensors on ``mesh``."""
    for name, packed in packed_weights(experts).items():
        places = places_of_quantized(packed.format)
        parts = {"data": places[name], "scales": places[f"s{name[1]}"]}
        if packed.flat_sizes is not None:
            parts = dict.fromkeys(parts, (Shard(0), Replicate()))
        for part, placements in parts.items():
            # Cloned, for a shard would otherwise keep the storage of the whole weight alive.
            whole = getattr(packed, part)
            setattr(packed, part, distribute_tensor(whole, mesh, placements, src_data_rank=None).clone())


def local_weights(experts: nn.Module) -> dict[str, QuantizedWeight]:
    """This rank's part of the quantised weights, by name."""
    found = {}
    for name, packed in packed_weights(experts).items():
        data, scales = (t.to_local() if isinstance(t, DTensor) else t for t in (packed.data, packed.scales))
        found[name] = QuantizedWeight(data, scales, packed.format, packed.flat_sizes)
    return found
