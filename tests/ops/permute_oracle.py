"""Problems for permute and combine, and their right results: a loop over copies, in fp64 or in a dtype.

Legend: T tokens, K copies a token, R rows, D model dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops import Permutation, combine, permute
from tests.ops.oracle import HALF, assert_accurate
from tests.ops.strategies import with_strides


class Problem(NamedTuple):
    """Rows for permute (``x``, and ``gy`` for its result) and for combine (``y``, ``gz``), and weights."""

    permutation: Permutation
    x: Tensor
    y: Tensor
    weights: Tensor | None
    gy: Tensor
    gz: Tensor


class Results(NamedTuple):
    """permute's row and gradients, then combine's. Gradients of absent weights are absent."""

    permuted: Tensor
    gx: Tensor
    gw_permute: Tensor | None
    combined: Tensor
    gy: Tensor
    gw_combine: Tensor | None


def problem(
    permutation: Permutation,
    D: int,
    dtype: torch.dtype,
    *,
    weighted: bool = True,
    weights_dtype: torch.dtype | None = None,
    exact: bool = True,
    strides: str = "contiguous",
    seed: int = 0,
) -> Problem:
    """Values as in :func:`tests.ops.strategies.problem`; ``strides`` are those of all rows."""
    generator = torch.Generator().manual_seed(seed)
    (T, K), R = permutation.positions.shape, len(permutation.slots)

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if exact:
            return torch.randint(-16, 17, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    y, gy = values(R, D), values(R, D)
    # Padding rows hold what nothing may read.
    y[permutation.slots < 0] = torch.nan
    gy[permutation.slots < 0] = torch.inf
    weights = values(T, K, dtype=weights_dtype or dtype) if weighted else None
    x, y, gy, gz = (with_strides(t, strides) for t in (values(T, D), y, gy, values(T, D)))
    return Problem(permutation, x, y, weights, gy, gz)


def run(p: Problem) -> Results:
    x, y = p.x.requires_grad_(), p.y.requires_grad_()
    weights = () if p.weights is None else (p.weights.requires_grad_(),)
    permuted, combined = permute(x, p.permutation, *weights), combine(y, p.permutation, *weights)
    gx, *gw_permute = torch.autograd.grad(permuted, (x, *weights), p.gy)
    gy, *gw_combine = torch.autograd.grad(combined, (y, *weights), p.gz)
    none = [None]
    return Results(permuted.detach(), gx, (gw_permute or none)[0], combined.detach(), gy, (gw_combine or none)[0])


def loop(p: Problem, dtype: torch.dtype | None) -> Results:
    """The results copy by copy: in fp64 with ``dtype`` None; else rounded to it, with sums in fp32 for half types."""
    acc = torch.float64 if dtype is None else torch.float32 if dtype in HALF else dtype
    x, y, gy, gz = (t.detach().to(acc) for t in (p.x, p.y, p.gy, p.gz))
    weights = torch.ones(p.permutation.positions.shape, dtype=acc) if p.weights is None else p.weights.detach().to(acc)
    permuted, gx, gw_permute = torch.zeros_like(y), torch.zeros_like(x), torch.zeros_like(weights)
    combined, gy_out, gw_combine = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(weights)
    for t, row in enumerate(p.permutation.positions.tolist()):
        for k, r in enumerate(row):
            if r >= 0:
                permuted[r] = weights[t, k] * x[t]
                gx[t] += weights[t, k] * gy[r]
                gw_permute[t, k] = gy[r] @ x[t]
                combined[t] += weights[t, k] * y[r]
                gy_out[r] = weights[t, k] * gz[t]
                gw_combine[t, k] = y[r] @ gz[t]
    results = [permuted, gx, gw_permute, combined, gy_out, gw_combine]
    if dtype is not None:
        kinds = [dtype, dtype, None, dtype, dtype, None]
        weights_dtype = dtype if p.weights is None else p.weights.dtype
        results = [t.to(kind or weights_dtype) for t, kind in zip(results, kinds, strict=True)]
    if p.weights is None:
        results[2] = results[5] = None
    return Results(*results)


def absolute(p: Problem) -> Problem:
    return p._replace(
        **{
            name: getattr(p, name).detach().abs()
            for name in ("x", "y", "weights", "gy", "gz")
            if getattr(p, name) is not None
        }
    )


def check(p: Problem, results: Results, *, exact: bool) -> None:
    truths = loop(p, None)
    theirs, magnitudes = (loop(p, p.x.dtype), loop(absolute(p), None)) if not exact else (truths, truths)
    for name, ours, naive, truth, magnitude in zip(Results._fields, results, theirs, truths, magnitudes, strict=True):
        if truth is None:
            assert ours is None, name
        elif exact:
            assert torch.equal(ours, truth.to(ours.dtype)), name
        else:
            assert_accurate(ours, naive, truth, magnitude, name=name)
