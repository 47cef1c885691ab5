"""Which part of a tensor of the one process a rank has: found by its values, since nothing else says it everywhere."""

import torch
from torch import Tensor

from moesaic.testing.record import Index


def take(whole: Tensor, index: Index) -> Tensor:
    """The part of a tensor that an index names."""
    for dim, chosen in enumerate(index):
        if chosen is not None:
            whole = whole.index_select(dim, chosen)
    return whole


def everything(t: Tensor) -> Index:
    """The index of all of a tensor."""
    return (None,) * t.ndim


def of_slices(whole: Tensor, slices: tuple[slice, ...]) -> Index:
    """An index from slices, which may be fewer than the dims."""
    chosen = [torch.arange(n)[s] for n, s in zip(whole.shape, slices, strict=False)]
    return (*chosen, *[None] * (whole.ndim - len(chosen)))


def find(part: Tensor, whole: Tensor) -> Index | None:
    """The part of ``whole`` that is nearest to ``part``, or None where no part has its shape.

    Along one dim any choice of indices is found, such as halves of a fused matrix. Along others only slices are.
    """
    if part.ndim != whole.ndim or any(p > w for p, w in zip(part.shape, whole.shape, strict=True)):
        return None
    dims = [d for d in range(part.ndim) if part.shape[d] != whole.shape[d]]
    if not dims:
        return everything(whole)
    return _find(part.detach().double(), whole.detach().double(), dims)[1]


def _find(part: Tensor, whole: Tensor, dims: list[int]) -> tuple[float, Index]:
    dim, *others = dims
    index: list[Tensor | None] = [None] * whole.ndim
    if not others:
        rows, among = (t.unsqueeze(-1).movedim(dim, 0).flatten(1) for t in (part, whole))
        index[dim] = _nearest(rows, among)
        return (part - take(whole, tuple(index))).norm().item(), tuple(index)
    best: tuple[float, Index] | None = None
    for start in range(whole.shape[dim] - part.shape[dim] + 1):
        chosen = torch.arange(start, start + part.shape[dim])
        error, rest = _find(part, whole.index_select(dim, chosen), others)
        if best is None or error < best[0]:
            best = error, (*rest[:dim], chosen, *rest[dim + 1 :])
    assert best is not None
    return best


def _nearest(rows: Tensor, among: Tensor) -> Tensor:
    """For each row the number of the nearest; a slice where that is as near."""
    if not rows.numel():
        return torch.arange(len(rows))
    distances = torch.cdist(rows, among, compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.argmin(1)
    # Equal rows, such as ones or zeros, say nothing about their place: a slice is the better guess.
    offsets = range(len(among) - len(rows) + 1)
    slices = [float(distances.diagonal(offset)[: len(rows)].sum()) for offset in offsets]
    start = min(offsets, key=lambda offset: slices[offset])
    if slices[start] <= float(distances.gather(1, chosen[:, None]).sum()):
        return torch.arange(start, start + len(rows))
    return chosen
