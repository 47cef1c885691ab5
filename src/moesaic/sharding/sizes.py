"""Sizes of a rule's factors, and whether blocks are cut between blocks only. Global sizes, never a rank's own."""

from collections.abc import Sequence
from math import prod

from moesaic.sharding.notation import Dim, Notation
from moesaic.sharding.rule import AxisRule

Shapes = Sequence[Sequence[int]]


def factor_sizes(line: Notation, inputs: Shapes, outputs: Shapes) -> dict[str, int] | None:
    """The size of every factor, or None where the shapes do not fit the patterns.

    A dim that may end early is in there as well, as it is written: ``{"(b g)?": 5}``.
    """
    pairs = list(zip(line.inputs + line.outputs, [*inputs, *outputs], strict=True))
    if any(len(pattern.dims) != len(shape) for pattern, shape in pairs):
        return None
    sizes: dict[str, int] = {}
    composite = []
    for pattern, shape in pairs:
        for dim, size in zip(pattern.dims, shape, strict=True):
            if len(dim.factors) > 1 and not dim.short:
                composite.append((dim.factors, size))
            elif sizes.setdefault(str(dim), size) != size:
                return None
    if sizes.pop("1", 1) != 1 or not _solve(composite, sizes):
        return None
    ends_early = [dim for pattern, _ in pairs for dim in pattern.dims if dim.short]
    return sizes if all(_blocks_fit(dim, sizes) for dim in ends_early) else None


def fit(line: Notation, inputs: Shapes, outputs: Shapes) -> tuple[Notation, dict[str, int]] | None:
    """The line for tensors of these numbers of dims, and the size of every factor; None where it does not fit."""
    spread = line.spread([len(shape) for shape in (*inputs, *outputs)])
    sizes = None if spread is None else factor_sizes(spread, inputs, outputs)
    return None if spread is None or sizes is None else (spread, sizes)


def divides(line: Notation, sizes: dict[str, int], axis_rules: Sequence[AxisRule], axis_sizes: Sequence[int]) -> bool:
    """Whether factors are cut where they may be.

    Blocks are cut between blocks only: a block factor divides by all the axes it is sharded over. Of others every rank
    has as much as it has to.
    """
    for factor, least in line.at_least:
        axes = [n for rule, n in zip(axis_rules, axis_sizes, strict=True) if rule.factor == factor and n > 1]
        if factor in sizes and axes and _smallest_shard(sizes[factor], axes) < least:
            return False
    for factor in line.blocks:
        axes = [n for rule, n in zip(axis_rules, axis_sizes, strict=True) if rule.factor == factor and n > 1]
        if sizes[factor] % prod(axes):
            return False
        for dim in {d for p in line.inputs + line.outputs for d in p.dims if d.short and d.leading == factor}:
            if not _cut_between_blocks(sizes[str(dim)], sizes[factor], _block_size(dim, sizes), axes):
                return False
    return True


def _smallest_shard(size: int, axes: Sequence[int]) -> int:
    """As ``torch.chunk`` cuts, axis by axis."""
    if not axes:
        return size
    step = -(-size // axes[0])
    last = max(0, size - (axes[0] - 1) * step)
    return min(_smallest_shard(step, axes[1:]), _smallest_shard(last, axes[1:]))


def _solve(composite: list[tuple[tuple[str, ...], int]], sizes: dict[str, int]) -> bool:
    """Add the factors of composite dims, each solved for the one factor that no other dim tells."""
    while composite:
        solved = [(f, s) for f, s in composite if sum(name not in sizes for name in f) <= 1]
        if not solved:
            return False
        for factors, size in solved:
            known = prod(sizes[name] for name in factors if name in sizes)
            unknown = next((name for name in factors if name not in sizes), None)
            if unknown is not None:
                sizes[unknown] = size // known if known else 0
                known *= sizes[unknown]
            if known != size:
                return False
        composite = [pair for pair in composite if pair not in solved]
    return True


def _block_size(dim: Dim, sizes: dict[str, int]) -> int:
    return prod(sizes[factor] for factor in dim.factors[1:])


def _blocks_fit(dim: Dim, sizes: dict[str, int]) -> bool:
    """Whether the blocks of a dim that may end early are as large as cutting it into that many parts makes them."""
    if not all(factor in sizes for factor in dim.factors):
        return False
    blocks, block, size = sizes[dim.factors[0]], _block_size(dim, sizes), sizes[str(dim)]
    if size == blocks * block:
        return True
    # One block that has it all is no blocks: another line of the rule may say what that is.
    return blocks > 0 and -(-size // blocks) == block and size != block


def _cut_between_blocks(size: int, blocks: int, block: int, axes: Sequence[int]) -> bool:
    """Whether every shard of a dim that may end early begins with a block, and has no more blocks than its rank."""
    if not axes or size == blocks * block or size == 0:
        return True
    n, *inner = axes
    step = -(-size // n)
    if step != blocks // n * block:
        return False
    shards = {min(step, max(0, size - i * step)) for i in range(n)}
    return all(_cut_between_blocks(shard, blocks // n, block, inner) for shard in shards)
