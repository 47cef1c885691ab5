"""One product of AMX's tiles, of the processor or emulated: the bits that Intel's manual writes down for TDPBF16PS."""

import math
from fractions import Fraction

import numpy as np
import pytest

from moesaic.ops.native import kernels
from moesaic.ops.processor import INSTRUCTION_SETS
from tests.ops.cpu_isa import TILED, needs_kernels

pytestmark = [needs_kernels, pytest.mark.skipif(not TILED, reason="no instruction set with tiles")]

SIDE = 16
SMALLEST, TOO_LARGE = Fraction(1, 2**126), Fraction(2) ** 128


def nearest(exact: Fraction, zero: float) -> float:
    """To fp32, to nearest even, 0 below the smallest normal number; ``zero`` where it is 0."""
    if exact == 0:
        return zero
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(exact / unit) * unit  # Python rounds halves to even
    if abs(rounded) < SMALLEST:
        return math.copysign(0.0, exact)
    return math.copysign(math.inf, exact) if abs(rounded) >= TOO_LARGE else float(rounded)


def fma(a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c  # as in fp32: no product of finite numbers is too large for a double
    product = math.copysign(1, a) * math.copysign(1, b)
    both_negative = product < 0 and math.copysign(1, c) < 0
    return nearest(Fraction(a) * Fraction(b) + Fraction(c), -0.0 if both_negative else 0.0)


def flushed(x: np.ndarray) -> np.ndarray:
    """As doubles, denormals as 0."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    with np.errstate(invalid="ignore"):
        return np.where(tiny, np.copysign(np.float32(0), x), x).astype(np.float64)


def as_fp32(halves: np.ndarray) -> np.ndarray:
    return flushed((halves.astype(np.uint32) << 16).view(np.float32))


def element(a: list[float], b: list[float], c: float) -> float:
    """Two chains, over the first and over the second of each pair, then their sum, then what was there."""
    chains = [0.0, 0.0]
    for k in range(2 * SIDE):
        chains[k % 2] = fma(a[k], b[k], chains[k % 2])
    return fma(1.0, fma(1.0, chains[0], chains[1]), c)


def numbers(rng, shape, low, high):
    """bf16 of any sign, with exponents from ``low`` to ``high`` (0 are denormals, 255 infinity and NaN)."""
    exponents = rng.integers(low, high + 1, shape)
    return (rng.integers(0, 2, shape) << 15 | exponents << 7 | rng.integers(0, 128, shape)).astype(np.uint16)


# The exponents of operands and sums: ordinary numbers; products around the smallest normal number, with denormal
# operands and sums; sums that overflow; all there are; and infinities and NaN.
EXPONENTS = {
    "ordinary": ((120, 134), (120, 134)),
    "tiny": ((58, 66), (0, 5)),
    "denormal": ((0, 1), (0, 254)),
    "huge": ((187, 191), (245, 254)),
    "any": ((0, 254), (0, 254)),
    "special": ((240, 255), (250, 255)),
}


@pytest.mark.parametrize("isa", TILED)
@pytest.mark.parametrize("kind", EXPONENTS)
def test_bits_of_one_product(isa, kind):
    rng = np.random.default_rng(len(kind))
    operands, sums = EXPONENTS[kind]
    a, b = numbers(rng, (SIDE, 2 * SIDE), *operands), numbers(rng, (2 * SIDE, SIDE), *operands)
    low = rng.integers(0, 2**16, (SIDE, SIDE), np.uint32)
    c = (numbers(rng, (SIDE, SIDE), *sums).astype(np.uint32) << 16 | low).view(np.float32)
    # Columns of which everything cancels: what is left is rounding.
    a[:, 16:], b[16:, :2] = a[:, :16], b[:16, :2] ^ 0x8000
    pairs = np.ascontiguousarray(b.reshape(SIDE, 2, SIDE).transpose(0, 2, 1))
    a, ours = np.ascontiguousarray(a), c.copy()
    call = kernels().library.moesaic_cpu_tile_product
    assert call(a.ctypes.data, pairs.ctypes.data, ours.ctypes.data, INSTRUCTION_SETS.index(isa)) == 0
    rows, columns, held = as_fp32(a).tolist(), as_fp32(b).T.tolist(), flushed(c).tolist()
    chosen = [(m, n) for m in range(SIDE) for n in range(m % 4, SIDE, 4)]
    expected = np.array([element(rows[m], columns[n], held[m][n]) for m, n in chosen], np.float32)
    got = np.array([ours[m, n] for m, n in chosen])
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert np.array_equal(got.view(np.uint32)[~np.isnan(got)], expected.view(np.uint32)[~np.isnan(got)])


def test_instruction_sets_without_tiles_refuse():
    memory = np.zeros(512, np.float32).ctypes.data
    for name in ("none", "avx2", "avx512_bf16"):
        assert kernels().library.moesaic_cpu_tile_product(memory, memory, memory, INSTRUCTION_SETS.index(name)) == 3
