"""The launches of every kernel, compiled ahead of time for GPUs that need not be there.

The functions that launch kernels run on tensors without memory, and each launch is compiled instead. ptxas comes with
triton.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moesaic.ops.choices import LARGEST
from moesaic.ops.experts_mlp.impl import triton as experts_mlp
from moesaic.ops.experts_mlp.problem import Problem, Projection, Target, Targets, Wanted
from moesaic.ops.grouped_mm.impl import triton as grouped_mm
from moesaic.ops.triton import device

_SMS = 132


@dataclass(frozen=True)
class Form:
    """What the experts compute."""

    activation: str
    is_gated: bool = True
    is_biased: bool = False


@dataclass(frozen=True)
class Sizes:
    """T tokens, K copies a token, E experts, model dim D, expert hidden dim F."""

    T: int
    K: int
    E: int
    D: int
    F: int


class _Driver:
    """Stands in for a GPU's."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Kernels are kept by device: a process can compile for several.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled_only(capability: str, take: Callable[[str, Any, dict[str, Any]], None]) -> Iterator[None]:
    """Within, launches are compiled for a GPU of ``capability``, and ``take(name, kernel, options)`` is called."""
    major, minor = map(int, capability.split("."))
    run, describe = JITFunction.run, device.describe
    driver.set_active(_Driver((major, minor)))
    device.describe = lambda _: device.nvidia((major, minor), _SMS)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        take(self.fn.__name__, kernel, options)
        return kernel

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run, device.describe = run, describe


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(sizes: Sizes, dtype: torch.dtype, form: Form) -> Problem:
    """Operands without memory."""
    T, K, E, D, F = sizes.T, sizes.K, sizes.E, sizes.D, sizes.F
    ids, weights = _empty(T, K, dtype=torch.int64), _empty(T, K, dtype=torch.float32)
    up = tuple(
        Projection(_empty(E, D, F, dtype=dtype), _empty(E, F, dtype=dtype) if form.is_biased else None)
        for _ in range(1 + form.is_gated)
    )
    down = Projection(_empty(E, F, D, dtype=dtype))
    return Problem(_empty(T, D, dtype=dtype), ids, weights, up, down, form.activation)


def experts_forward(p: Problem) -> None:
    """Without gradients, and with them."""
    experts_mlp.forward(p, False)
    experts_mlp.forward(p, True)


def experts_backward(p: Problem, main_gradients: bool) -> None:
    """All gradients; those of weights new ones, or added to fp32 buffers."""
    L, F = p.num_lines, p.down.weight.shape[1]
    pre = tuple(_empty(L, F, dtype=p.x_TD.dtype) for _ in p.projections)

    def targets(projection: Projection) -> Targets:
        into = _empty(*projection.weight.shape, dtype=torch.float32) if main_gradients else None
        return Targets(Target(projection.weight, into), None if projection.bias is None else Target(projection.bias))

    *up, down = (targets(projection) for projection in (*p.projections, p.down))
    experts_mlp.backward(_empty(*p.x_TD.shape, dtype=p.x_TD.dtype), p, pre, Wanted(True, True, tuple(up), down))


def products(sizes: Sizes, dtype: torch.dtype) -> None:
    """The grouped products alone, and a weight gradient that is added to an fp32 buffer."""
    num_rows = sizes.T * sizes.K
    x, grad = (_empty(num_rows, n, dtype=dtype) for n in (sizes.D, sizes.F))
    w = _empty(sizes.E, sizes.D, sizes.F, dtype=dtype)
    group_sizes = _empty(1, sizes.E, dtype=torch.int64)
    grouped_mm.forward(x, w, group_sizes, dtype)
    grouped_mm.forward(grad, w.mT, group_sizes, dtype)
    if LARGEST["some"] < sizes.T * sizes.K // sizes.E:
        # It turns the largest blocks around in shared memory.
        grouped_mm.forward(x, w, group_sizes, torch.float32)
    grouped_mm.weight_grad(x, grad, group_sizes, sizes.E)
    grouped_mm.weight_grad_into(w.float(), x, grad, group_sizes)
