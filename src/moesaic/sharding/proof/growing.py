"""Larger calls made of an example: what a kernel does otherwise above some size shows between a shard and the whole."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from moesaic.sharding.notation import Notation, Pattern
from moesaic.sharding.proof.examples import Example, fixed_factors, has_fractions, sizes_of

# Of each size and the next, one is the whole and a shard of two ranks is the other: any threshold up to the last lies
# between a shard and a whole.
_SIZES = (17, 33, 65, 129, 257)
_MOST = 2**17  # elements of a tensor


def grown(example: Example) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls with larger sizes of the factors that the rule cuts, in words and as arguments.

    All factors grow together, as far as tensors stay small; beyond, each by itself. Values are those of the example
    over and over, each a little smaller in magnitude. Only where all tensors have fractions: what integers may be at
    other sizes only the user knows.
    """
    line = example.line
    if line is None or not line.text or not all(map(has_fractions, example.tensors)):
        return
    sizes = sizes_of(line, example)
    factors = [f for f in line.shardable if f in sizes and f not in fixed_factors(line, example)]
    for size in _SIZES:
        targets = {f: _even(size) if f in line.blocks else size for f in factors if size > sizes[f]}
        for target in [targets] if _is_small(line, sizes | targets) else [{f: n} for f, n in targets.items()]:
            larger = sizes | target
            if target and _is_small(line, larger):
                tensors = zip(line.inputs, example.tensors, strict=True)
                what = ", ".join(f"{f} of {n}" for f, n in target.items())
                yield what, example.arguments([_grow(t, p, sizes, larger, i) for i, (p, t) in enumerate(tensors)])


def _even(size: int) -> int:
    return size - 1  # a power of two, which most axes divide


def _is_small(line: Notation, sizes: Mapping[str, int]) -> bool:
    patterns = (*line.inputs, *line.outputs)
    return all(prod(sizes.get(f, 1) for dim in p.dims for f in dim.factors) <= _MOST for p in patterns)


def _grow(t: Tensor, pattern: Pattern, old: Mapping[str, int], new: Mapping[str, int], seed: int) -> Tensor:
    shape = [new.get(f, 1) for dim in pattern.dims for f in (dim.factors or ("",))]
    if t.numel() == 0:
        return t
    apart = t.reshape([old.get(f, 1) for dim in pattern.dims for f in (dim.factors or ("",))])
    for dim, size in enumerate(shape):
        apart = apart.index_select(dim, torch.arange(size, device=t.device) % apart.shape[dim])
    generator = torch.Generator().manual_seed(seed)
    smaller = (1 - torch.rand(apart.shape, generator=generator, dtype=torch.float64) / 4).to(apart)
    flat = [prod(new.get(f, 1) for f in dim.factors) for dim in pattern.dims]
    return (apart * smaller).reshape(flat)
