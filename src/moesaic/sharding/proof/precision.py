"""The values a call is proved with: of the widest dtype that the operator takes, so that rounding is no excuse."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.sharding.proof.examples import Example, has_fractions
from moesaic.sharding.proof.noise import inner_eps, is_whole, ordinary

_LARGEST = 3  # products of these, summed over a hundred rows, are whole numbers that bfloat16 has
_HALF = 2.0**-10  # the rounding of float16, the finer of the half types


def precise(given: Example) -> tuple[Example, str]:
    """The call in float64, else in float32, else on whole numbers; and what there is to note of it, "" if nothing.

    Of half types only whole numbers are exact: what is off by a small term would pass for rounding. So it is where the
    operator rounds to them inside.
    """
    example, note = given, "the operator does not take float32"
    for dtype in (torch.float64, torch.float32):
        wide = [_at_least(t, dtype) for t in given.tensors]
        if _takes(given, wide):
            example = replace(given, args=given.arguments(wide))
            note = "" if dtype == torch.float64 else "the operator does not take float64: compared in float32"
            break
    example = replace(example, eps=inner_eps(example))
    if not note and 0 < example.eps < _HALF:
        note = "the operator rounds to float32 inside: compared as float32"
    has_half_types = any(has_fractions(t) and _eps(t) >= _HALF for t in (*example.tensors, *example.run()))
    if not has_half_types and example.eps < _HALF:
        return example, note
    note = note or "the operator rounds its results coarsely"
    drawn = replace(example, args=example.arguments(_drawn(example)), whole=True)
    if _is_finite(drawn):
        return drawn, f"{note}: compared on small whole numbers, drawn in place of the given values"
    return (
        example,
        f"{note}, and its results for whole numbers are not finite: compared with the tolerance of its dtype",
    )


def exact(given: Example) -> Example | None:
    """The call on small whole numbers in the dtypes it was given in, if sums and products are all that it is made of.

    Then its results are whole numbers, no step rounds, and there is no tolerance that an error could hide behind. None
    if they are not.
    """
    if not any(map(has_fractions, given.tensors)):
        return None
    drawn = replace(given, args=given.arguments(_drawn(given)), whole=True, eps=0.0)
    if not _is_finite(drawn):
        return None
    results = [r for r in drawn.run() if has_fractions(r)]
    tensors = [t for t in (*drawn.tensors, *results) if has_fractions(t)]
    eps = max(map(_eps, tensors))
    is_exact = all(is_whole(r) and ordinary(r) * eps <= 2 for r in results)
    return (
        drawn if results and is_exact and any(bool((r != r.flatten()[0]).any()) for r in results if r.numel()) else None
    )


def same_dtypes(a: Example, b: Example) -> bool:
    """Whether two examples of a call have tensors of the same dtypes."""
    return [t.dtype for t in a.tensors] == [t.dtype for t in b.tensors]


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps


def _at_least(t: Tensor, dtype: torch.dtype) -> Tensor:
    if not has_fractions(t) or _eps(t) <= torch.finfo(dtype).eps:
        return t
    return t.to(dtype.to_complex() if t.is_complex() else dtype)


def _takes(example: Example, tensors: Sequence[Tensor]) -> bool:
    try:
        # The fake kernel may be choosier than the real one, and DTensor calls it.
        for given in ([t.to("meta") for t in tensors], tensors):
            example.run(given)
    except Exception:
        return False
    return True


def _drawn(example: Example) -> list[Tensor]:
    return [_whole_numbers(t, seed) if has_fractions(t) else t for seed, t in enumerate(example.tensors)]


def _whole_numbers(t: Tensor, seed: int) -> Tensor:
    """Small and not zero, of both signs, and never all the same size but for a single one."""
    if t.is_complex():
        real, imaginary = (_whole_numbers(part, seed + i) for i, part in enumerate((t.real, t.imag)))
        return torch.complex(real, imaginary)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randperm(t.numel(), generator=generator) % _LARGEST + 1
    signs = torch.randint(2, (t.numel(),), generator=generator) * 2 - 1
    return (sizes * signs).view(t.shape).to(t)


def _is_finite(example: Example) -> bool:
    try:
        results = example.run()
    except Exception:
        return False
    return all(bool(r.isfinite().all()) for r in results)
