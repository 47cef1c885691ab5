"""Quantise experts while they are read: each rank its part, expert by expert, and no wide copy of more than one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moesaic.integrations.transformers.lazy import Box, LazyTensor
from moesaic.integrations.transformers.plain import name_without_wrappers
from moesaic.layers.packed import PackedWeight
from moesaic.ops.quantized import FORMATS, quantize
from moesaic.parallel.split import modules_in_whole
from moesaic.sharding.parts import local_part


@torch.no_grad()
def fill_packed(model: nn.Module, tensors: Mapping[str, LazyTensor]) -> list[Tensor]:
    """Fill this rank's part of the quantised weights of a model, and give back their data and scales.

    Args:
        model: after :func:`moesaic.layers.quantize_`; it may be parallelized, or be stages.
        tensors: by the names that the weights had before.

    Raises:
        ValueError: numbers that are not finite; the message names the weight.
    """
    filled: list[Tensor] = []
    for name, packed in modules_in_whole(model):
        # Of files that are quantised already, data and scales are read as they are.
        if not isinstance(packed, PackedWeight) or f"{name_without_wrappers(name)}.data" in tensors:
            continue
        filled += packed.buffers(recurse=False)
        (data, box), (scales, _) = local_part(packed.data), local_part(packed.scales)
        experts, inputs, outputs = _of_weight(packed, box)
        for i, expert in enumerate(range(experts.start, experts.stop) if data.numel() else ()):
            w = tensors[name].read((slice(expert, expert + 1), inputs, outputs))
            try:
                part = quantize(w, packed.format)
            except ValueError as error:
                raise ValueError(f"'{name}', expert {expert}: {error}") from None
            data[i], scales[i] = part.data[0], part.scales[0]
    return filled


def _of_weight(packed: PackedWeight, box: Box) -> Box:
    """Which part of the weight ``[E, I, O]`` a part of its data is. No block is cut, so that one is quantised alone."""
    if packed.flat_sizes is not None:
        # Blocks that run over the ends of rows: experts are whole.
        return (box[0], *(slice(0, size) for size in packed.flat_sizes))
    block = FORMATS[packed.format].block or 1
    experts, outputs, inputs = box[:3]
    return experts, slice(inputs.start * block, inputs.stop * block), outputs
