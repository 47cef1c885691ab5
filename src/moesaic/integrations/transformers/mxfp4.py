"""Files whose experts are MXFP4, as those of gpt-oss: read as they are, or decoded part by part.

Legend: E experts, O outputs of a matrix, I its inputs, T = I / 32 blocks of an output.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from moesaic.integrations.transformers.lazy import Box, LazyTensor
from moesaic.integrations.transformers.links import INTERLEAVED_GATE_UP
from moesaic.integrations.transformers.origin import origin_of
from moesaic.layers.packed import PackedWeight
from moesaic.ops.quantized import FORMATS, Format
from moesaic.ops.quantized.formats import decode

FORMAT: Format = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"


class Stored(NamedTuple):
    """A weight in the files: ``blocks [E, O, T, 16]`` and ``scales [E, O, T]``, both uint8."""

    blocks: LazyTensor
    scales: LazyTensor


def is_mxfp4(config: Any) -> bool:
    """Whether a config says that the experts in the files are MXFP4."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return getattr(method, "value", method) == FORMAT


def set_apart(
    path: str | Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype
) -> tuple[dict[str, LazyTensor], dict[str, Stored]]:
    """The tensors of files, with a stand-in ``[E, I, O]`` for each stored weight; and those weights by name.

    A stand-in has the shape of the weight, so that names and shapes are checked as those of others. Its numbers cannot
    be read.

    Raises:
        ValueError: blocks without scales or the other way round, or their shapes or dtypes are not those of the format.
    """
    others, stored = dict(tensors), dict[str, Stored]()
    for name in sorted(tensors):
        weight = name.removesuffix(_BLOCKS)
        if weight == name:
            continue
        if weight + _SCALES not in tensors:
            raise ValueError(f"{path}: '{name}' is there, and '{weight + _SCALES}' is not")
        found = Stored(others.pop(name), others.pop(weight + _SCALES))
        for part, kind in ((found.blocks, _BLOCKS), (found.scales, _SCALES)):
            if part.dtype != torch.uint8:
                raise ValueError(f"{path}: '{weight + kind}' is {part.dtype}, and {FORMAT} has torch.uint8")
        block = FORMATS[FORMAT].block or 0
        if found.blocks.shape != (*found.scales.shape, block // 2) or found.scales.ndim != 3:
            raise ValueError(
                f"{path}: '{weight}' has blocks {list(found.blocks.shape)} and scales {list(found.scales.shape)}; "
                f"{FORMAT} has [E, O, T, {block // 2}] and [E, O, T]"
            )
        E, O, T = found.scales.shape  # noqa: E741
        stored[weight] = found
        others[weight] = LazyTensor((E, T * block, O), dtype, _not_read)
    return others, stored


def decoded(stored: Stored, dtype: torch.dtype) -> LazyTensor:
    """The weight ``[E, I, O]``, of which blocks are decoded as they are read. bf16 holds all of its numbers."""
    E, O, T = stored.scales.shape  # noqa: E741
    block = FORMATS[FORMAT].block or 0

    def read(box: Box) -> Tensor:
        experts, inputs, outputs = box
        of_blocks = slice(inputs.start // block, -(-inputs.stop // block))
        data = stored.blocks.read((experts, outputs, of_blocks, slice(0, block // 2)))
        scales = stored.scales.read((experts, outputs, of_blocks))
        size = block * (of_blocks.stop - of_blocks.start)
        w_EOI = decode(FORMAT, data, scales, data.shape[1], size)
        first = inputs.start - block * of_blocks.start
        return w_EOI[..., first : first + inputs.stop - inputs.start].mT.to(dtype)

    return LazyTensor((E, T * block, O), dtype, read)


def to_our_parts(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, LazyTensor]:
    """Data and scales of the quantised experts of a model, by their names in it.

    Args:
        model: swapped, and then quantised to MXFP4.

    Raises:
        ValueError: some of its experts are not in ``stored``, or ``stored`` has weights of others.
    """
    left, parts = dict(stored), dict[str, LazyTensor]()
    for prefix, module in model.named_modules():
        for link in () if (origin := origin_of(module)) is None else origin.links:
            if (found := left.pop(f"{prefix}.{link.theirs}", None)) is None:
                continue
            data, scales = ([t[:, ::2], t[:, 1::2]] if link is INTERLEAVED_GATE_UP else [t] for t in found)
            for name, of_data, of_scales in zip(link.ours, data, scales, strict=True):
                parts |= {f"{prefix}.{name}.data": of_data, f"{prefix}.{name}.scales": of_scales}
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    if missing := [name for name in packed if f"{name}.data" not in parts]:
        raise ValueError(f"the config says that experts are {FORMAT}, but the files have no blocks for {missing}")
    if left:
        raise ValueError(f"the files have {FORMAT} blocks that are not of experts: {sorted(left)}")
    return parts


def _not_read(box: Box) -> NoReturn:
    raise AssertionError(f"a stand-in of a weight of {FORMAT} has no numbers: {box}")
