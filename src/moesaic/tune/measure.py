"""Time the CPU kernels against torch's products, for every kind of call that a table of choices has.

Both take turns on the same operands, and medians are compared: of one thread by its own processor time, of several by
the clock. Each kind of call is timed with few wide experts and with many narrow ones.

Legend: E experts, D model dim, F hidden dim, R rows, T tokens, of which each goes to one expert.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from moesaic.ops.choices import CHOSEN, OPERATORS, SHAPES, Case, Choices

# Average rows a group by the name of the shape; powers of two would favour whoever likes them.
ROWS = {"one": 1, "few": 6, "some": 33, "many": 97}


class Sizes(NamedTuple):
    """Of the experts that are timed."""

    E: int
    D: int
    F: int


# Three matrices of either are 50 MB in fp32: more than most caches hold.
SIZES = (Sizes(4, 512, 2048), Sizes(32, 512, 256))

# Where the kernels and torch are this close, a choice is not changed: the next run may say the opposite.
CLOSE = 1.03
# An implementation that takes this long, and that many times as long as the other, is timed once.
SLOW_S, SLOW = 0.2, 3.0


class Timed(NamedTuple):
    """Of a kind of call: seconds of each implementation by sizes, and torch's time over that of the kernels.

    The ratio is the geometric mean over the sizes.
    """

    case: Case
    seconds: list[dict[str, float]]
    ratio: float

    def fastest(self, before: str) -> str:
        """The implementation to choose, where it has been ``before``."""
        if self.ratio > CLOSE:
            return "cpu"
        return "torch" if self.ratio < 1 / CLOSE else before


def measure(dtype: torch.dtype, rounds: int, sizes: tuple[Sizes, ...] = SIZES) -> Iterator[Timed]:
    """Time all operators and shapes in a dtype, operator by operator."""
    made = {shape: [calls(of, ROWS[shape], dtype) for of in sizes] for shape in SHAPES}
    for operator in OPERATORS:
        for shape in SHAPES:
            seconds = [race(by_operator[operator], rounds) for by_operator in made[shape]]
            ratio = math.exp(statistics.mean(math.log(s["torch"] / s["cpu"]) for s in seconds))
            yield Timed(Case(operator, dtype, shape), seconds, ratio)


def race(run: Callable[[str], object], rounds: int) -> dict[str, float]:
    """Median seconds of ``run("cpu")`` and ``run("torch")``, which take turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def once(impl: str) -> float:
        start = clock()
        run(impl)
        return max(clock() - start, 1e-9)  # the clock may be coarse

    for impl in CHOSEN:
        once(impl)  # warms up: memory that is new costs more than what is computed
    taken = {impl: [once(impl)] for impl in CHOSEN}
    (fast,), (slow,) = sorted(taken.values())
    for _ in range(0 if slow > SLOW_S and slow > SLOW * fast else rounds - 1):
        for impl, seconds in taken.items():
            seconds.append(once(impl))
    return {impl: statistics.median(seconds) for impl, seconds in taken.items()}


def calls(sizes: Sizes, rows: int, dtype: torch.dtype) -> dict[str, Callable[[str], object]]:
    """For each operator a call of it by the implementation of a name, with so many rows a group."""
    (E, D, F), R = sizes, rows * sizes.E
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).mul_(shape[-2] ** -0.5).to(dtype)

    x_RD, grad_RD, grad_RF = normal(R, D), normal(R, D), normal(R, F)
    w1_EDF, w3_EDF, w2_EFD = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    sizes_E = torch.full((E,), rows)
    ids_1T1 = (torch.randperm(R, generator=random) % E).view(1, R, 1)
    tokens = x_RD.unsqueeze(0), ids_1T1, torch.rand(1, R, 1, generator=random), ids_1T1.new_empty(1, E)
    operands = (*tokens, w1_EDF, w3_EDF, w2_EFD, None, None, None)
    pre = normal(1, R, 1, F), normal(1, R, 1, F)
    backward = (grad_RD.unsqueeze(0), *operands, *pre)
    into_EDF, into_EFD = (torch.zeros(w.shape) for w in (w1_EDF, w2_EFD))
    needs = [True, True, True, True, True, False, False, False]
    only_tokens = [True, True, *[False] * 6]
    ops = torch.ops.moesaic
    return {
        "grouped_mm": lambda impl: ops.grouped_mm(x_RD, w1_EDF, sizes_E, impl),
        "grouped_mm_input_grad": lambda impl: ops.grouped_mm_input_grad(grad_RF, w1_EDF, sizes_E, impl),
        "grouped_mm_weight_grad": lambda impl: ops.grouped_mm_weight_grad(x_RD, grad_RF, sizes_E, w1_EDF, impl),
        "grouped_mm_accumulate_weight_grad": lambda impl: ops.grouped_mm_accumulate_weight_grad(
            into_EDF, x_RD, grad_RF, sizes_E, impl
        ),
        "experts_mlp": lambda impl: ops.experts_mlp(*operands, "silu", impl),
        "experts_mlp_inference": lambda impl: ops.experts_mlp_inference(*operands, "silu", impl),
        "experts_mlp_backward": lambda impl: ops.experts_mlp_backward(*backward, "silu", impl, needs),
        # w1 and w3 may share what nobody reads.
        "experts_mlp_backward_into": lambda impl: ops.experts_mlp_backward_into(
            *backward, into_EDF, into_EDF, into_EFD, "silu", impl, only_tokens
        ),
    }


def chosen(timed: list[Timed], before: Choices) -> Choices:
    """The choices that follow. Where none has been before, a close call goes to the kernels, which need less memory."""
    return {one.case: one.fastest(before.get(one.case, "cpu")) for one in timed}
