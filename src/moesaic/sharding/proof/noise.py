"""How far apart two results may be and still be the same: rounding, as the operator itself rounds, and no more."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.sharding.proof.examples import Example, has_fractions

# Values this much larger than all others are no measure of them: -1e30 and finfo.min, with which masks fill.
_GAP = 1e3
_FEW = 0.05
# Digits, in bits, of bfloat16, float16 and float32.
_WIDTHS = (8, 11, 24)


class Tolerance(NamedTuple):
    """``|a - b| <= atol + rtol * |b|``, element by element."""

    rtol: float = 0.0
    atol: float = 0.0


EXACT = Tolerance()


def tolerance(expected: Tensor, parts: Sequence[Tensor], eps: float, *, whole: bool) -> Tolerance:
    """How far a result may be off that is put together from parts, which may be larger than it, but not by much.

    Args:
        eps: of the coarsest rounding in the operator.
        whole: whether the operator was given whole numbers.
    """
    if not has_fractions(expected) or eps == 0 or (whole and all(_is_exact(t, eps) for t in (expected, *parts))):
        return EXACT
    # Of whole numbers in half types each step rounds once, for sums of them are exact.
    rtol = 4 * eps if whole and eps > 1e-5 else 4 * eps**0.75
    return Tolerance(rtol, rtol * 4 * ordinary(expected))


def _is_exact(t: Tensor, eps: float) -> bool:
    """Whether all are whole numbers below 2 / eps, which itself may be a larger one that was rounded."""
    if not is_whole(t):
        return False
    largest = float(t.abs().max()) if t.numel() else 0.0
    return largest * eps < 2 or ordinary(t) * eps < 2


def ordinary(t: Tensor) -> float:
    """The largest magnitude that is no outlier: the last before a gap, if there is one; 1 of nothing but zeros."""
    if not has_fractions(t) or t.numel() == 0:
        return 1.0
    magnitudes = t.detach().abs().flatten().double()
    magnitudes = magnitudes[magnitudes.isfinite()]
    nonzero = magnitudes[magnitudes > 0].sort().values
    if nonzero.numel() == 0:
        return 1.0
    if nonzero.numel() < magnitudes.numel() and nonzero[0] > _GAP:
        return 1.0  # zeros, and outliers
    if nonzero[-1] <= _GAP * nonzero[0]:
        return float(nonzero[-1])
    gaps = (nonzero[1:] > _GAP * nonzero[:-1]).nonzero().flatten()
    # A few values are small by cancellation, and no measure of the others.
    gaps = gaps[gaps + 1 >= _FEW * nonzero.numel()]
    return float(nonzero[gaps[0]] if gaps.numel() else nonzero[-1])


def is_whole(t: Tensor) -> bool:
    """Whether all values are whole numbers."""
    t = torch.view_as_real(t) if t.is_complex() else t
    return not t.is_floating_point() or torch.equal(t, t.round())


def inner_eps(example: Example) -> float:
    """The rounding inside of an operator that takes wider values than it computes with; 0 if there is none.

    It is seen from outside: nothing changes if an argument is rounded, although more would change it; or the results
    are all of few digits.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [_jittered(t, 2.0**-6, generator) for t in example.tensors]
    try:
        results = _fractions(example.run(tensors))
        widths = [bits for r in results if (bits := _width_of_results(r))]
        for i, t in enumerate(tensors):
            if not has_fractions(t) or t.numel() == 0:
                continue
            for bits in _WIDTHS:
                rounded = [*tensors[:i], _rounded(t, bits), *tensors[i + 1 :]]
                moved = [*tensors[:i], _jittered(t, 2.0 ** (4 - bits), generator), *tensors[i + 1 :]]
                if _equal(results, _fractions(example.run(rounded))):
                    # What is not read at all tells nothing, nor does what is compared or cut off.
                    widths += [bits] if _mostly_differ(results, _fractions(example.run(moved))) else []
                    break
    except Exception:
        return 0.0  # it refuses values that are next to those it takes
    return 2.0 ** (1 - min(widths)) if widths else 0.0


def _fractions(results: Sequence[Tensor]) -> list[Tensor]:
    return [r for r in results if has_fractions(r)]


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def _mostly_differ(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return any(2 * int((x.nan_to_num() != y.nan_to_num()).sum()) > x.numel() for x, y in zip(a, b, strict=True))


def _jittered(t: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Each value a little smaller in magnitude, so that it stays where an operator takes it."""
    if not has_fractions(t):
        return t
    return t * (1 - size * torch.rand(t.shape, generator=generator, dtype=torch.float64)).to(t)


def _width_of_results(t: Tensor) -> int | None:
    """The fewest digits that all values have; None if they have more than float32, or so few that it is by chance."""
    t = t[t.isfinite()]
    by_chance = 4
    if t.numel() == 0 or torch.equal(_rounded(t, by_chance), t) or is_whole(t):
        return None
    return next((bits for bits in _WIDTHS if torch.equal(_rounded(t, bits), t)), None)


def _rounded(t: Tensor, bits: int) -> Tensor:
    if t.is_complex():
        return torch.view_as_complex(_rounded(torch.view_as_real(t), bits))
    mantissa, exponent = torch.frexp(t)
    return torch.ldexp((mantissa * 2.0**bits).round() * 2.0**-bits, exponent).to(t)
