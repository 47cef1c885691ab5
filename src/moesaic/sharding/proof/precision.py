"""The values a call is proved with: of the widest dtype that the operator takes, so that rounding is no excuse."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.sharding.proof.examples import Example

_LARGEST = 3  # products of these, summed over a hundred rows, are whole numbers that bfloat16 has


def precise(given: Example) -> tuple[Example, str]:
    """The call in float64, else in float32, else on whole numbers; and what there is to note of it, "" if nothing.

    Of half types only whole numbers are exact: what is off by a small term would pass for rounding.
    """
    example, note = given, "the operator does not take float32"
    for dtype in (torch.float64, torch.float32):
        wide = [_at_least(t, dtype) for t in given.tensors]
        if _takes(given, wide):
            example = replace(given, args=given.arguments(wide))
            note = "" if dtype == torch.float64 else "the operator does not take float64: compared in float32"
            break
    if not any(t.is_floating_point() and t.dtype.itemsize < 4 for t in (*example.tensors, *example.run())):
        return example, note
    note = note or "the operator rounds its results coarsely"
    numbers = [_whole_numbers(t, seed) if t.is_floating_point() else t for seed, t in enumerate(example.tensors)]
    drawn = replace(example, args=example.arguments(numbers), whole=True)
    if _is_finite(drawn):
        return drawn, f"{note}: compared on small whole numbers, drawn in place of the given values"
    return (
        example,
        f"{note}, and its results for whole numbers are not finite: compared with the tolerance of its dtype",
    )


def _at_least(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype.itemsize < dtype.itemsize else t


def _takes(example: Example, tensors: Sequence[Tensor]) -> bool:
    try:
        # The fake kernel may be choosier than the real one, and DTensor calls it.
        for given in ([t.to("meta") for t in tensors], tensors):
            example.run(given)
    except Exception:
        return False
    return True


def _whole_numbers(t: Tensor, seed: int) -> Tensor:
    """Small and not zero, of both signs, and never all the same size but for a single one."""
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
