"""What placements mean: the part of a global value that each rank has, and the global value that parts make up."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from moesaic.sharding.proof.noise import EXACT, Tolerance, is_whole, ordinary
from moesaic.sharding.rule import Placements, has_one_reduction


def axis_placements(ndim: int, dtype: torch.dtype) -> list[Placement]:
    """Every placement of a tensor on one mesh axis: the plainest first.

    Means only where there are fractions, and no largest of complex numbers. A sum of bools is true where one is.
    """
    shards = [Shard(dim) for dim in range(ndim)]
    reductions = ["sum", "avg", "max", "min"]
    if dtype.is_complex:
        reductions = ["sum", "avg"]
    elif not dtype.is_floating_point:
        reductions.remove("avg")
    return [Replicate(), *shards, *map(Partial, reductions)]


def mesh_placements(ndim: int, dtype: torch.dtype, num_axes: int) -> Iterator[Placements]:
    """Every placement of a tensor on a mesh."""
    return filter(has_one_reduction, product(axis_placements(ndim, dtype), repeat=num_axes))


def is_even(shape: Sequence[int], placements: Placements, mesh: Sequence[int]) -> bool:
    """Whether all shards have the same size."""
    sizes = list(shape)
    for placement, n in zip(placements, mesh, strict=True):
        if isinstance(placement, Shard):
            if sizes[placement.dim] % n:
                return False
            sizes[placement.dim] //= n
    return True


def split(value: Tensor, placements: Placements, mesh: Sequence[int], seed: int = 0) -> list[Tensor]:
    """The part of every rank, in the order of ranks. What is ``Partial`` is made of unrelated terms.

    Two values that are both ``Partial`` need two seeds, lest they be related.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [value]
    for placement, n in zip(placements, mesh, strict=True):
        parts = [piece for part in parts for piece in _pieces(part, placement, n, generator)]
    return [part.contiguous() for part in parts]


def join(
    parts: Sequence[Tensor], placements: Placements, mesh: Sequence[int], allowed: Tolerance = EXACT
) -> Tensor | None:
    """The global value, or None if there is none: sizes that no shards have, replicas that differ."""
    values: list[Tensor | None] = list(parts)
    for placement, n in reversed(list(zip(placements, mesh, strict=True))):
        values = [_joined(values[i : i + n], placement, allowed) for i in range(0, len(values), n)]
    return values[0]


def same(a: Tensor, b: Tensor, allowed: Tolerance = EXACT) -> bool:
    """Whether they have the same shape and the same values, NaN being equal to NaN."""
    rtol, atol = allowed
    return a.shape == b.shape and torch.allclose(a, b.to(a.dtype), rtol=rtol, atol=atol, equal_nan=True)


def shard_sizes(size: int, n: int) -> list[int]:
    """Sizes of the shards of a dim, as ``torch.chunk`` cuts it; the last ones may be zero."""
    step = -(-size // n)
    return [min(step, max(0, size - i * step)) for i in range(n)]


def _pieces(value: Tensor, placement: Placement, n: int, generator: torch.Generator) -> list[Tensor]:
    if isinstance(placement, Shard):
        return list(value.split(shard_sizes(value.shape[placement.dim], n), placement.dim))
    if not isinstance(placement, Partial):
        return [value] * n
    reduction = placement.reduce_op
    if reduction in ("max", "min") or value.dtype == torch.bool:
        holder = torch.randint(n, value.shape, generator=generator).to(value.device)
        others = [_beyond(value, reduction == "min", generator) for _ in range(n)]
        return [torch.where(holder == rank, value, others[rank]) for rank in range(n)]
    terms = [_noise(value, generator) for _ in range(n - 1)]
    total = value * n if reduction == "avg" else value
    return [*terms, total - sum(terms, torch.zeros_like(value))]


def _beyond(value: Tensor, above: bool, generator: torch.Generator) -> Tensor:
    """Values that are not larger than the given ones, or not smaller."""
    if value.dtype == torch.bool:
        other = torch.randint(2, value.shape, generator=generator).to(value)
        return value | other if above else value & other
    if value.is_floating_point():
        noise = _noise(value, generator).abs()
        return value + noise if above else value - noise
    noise, limits = torch.randint(5, value.shape, generator=generator), torch.iinfo(value.dtype)
    wide = value.to(torch.int64)
    return (wide + noise if above else wide - noise).clamp(limits.min, limits.max).to(value)


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    # Whole numbers are made of whole numbers, so that sums of them stay exact.
    if is_whole(value):
        real = torch.randint(-4, 5, value.shape, generator=generator).to(value)
        return real + 1j * torch.randint(-4, 5, value.shape, generator=generator) if value.is_complex() else real
    magnitudes, scale = value.abs(), ordinary(value)
    kind = torch.complex128 if value.is_complex() else torch.float64
    noise = torch.randn(value.shape, generator=generator, dtype=kind)
    # Where a value is an outlier, so are its terms, and no others: what a mask fills in says nothing of the rest.
    of_outliers = (magnitudes / 16).nan_to_num(posinf=scale)
    return (noise * torch.where(magnitudes > scale, of_outliers, scale)).to(value)


def _joined(parts: Sequence[Tensor | None], placement: Placement, allowed: Tolerance) -> Tensor | None:
    known = [part for part in parts if part is not None]
    first = known[0] if known else None
    if first is None or len(known) < len(parts):
        return None
    if isinstance(placement, Shard):
        dim = placement.dim
        shapes = [[*p.shape[:dim], *p.shape[dim + 1 :]] for p in known]
        sizes = [p.shape[dim] for p in known]
        if any(s != shapes[0] for s in shapes) or sizes != shard_sizes(sum(sizes), len(sizes)):
            return None
        return torch.cat(known, dim)
    if any(p.shape != first.shape for p in known):
        return None
    if not isinstance(placement, Partial):
        return first if all(p is first or same(p, first, allowed) for p in known) else None
    stack = torch.stack(known)
    if stack.dtype == torch.bool and placement.reduce_op == "sum":
        return stack.any(0)
    # Small integers wrap around, as in a collective.
    return {"sum": stack.sum, "avg": stack.mean, "max": stack.amax, "min": stack.amin}[placement.reduce_op](0).to(stack)
