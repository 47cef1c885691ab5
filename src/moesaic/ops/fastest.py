"""What ``impl=None`` goes by: where the CPU kernels are the fastest, and on CUDA what is, by operator and shape class.

**CUDA awaits measurement**: the Triton kernels are compiled for GPUs and checked in an interpreter, and were timed on
none. Until ``benchmarks/gpu`` has run on one, every entry is ``"torch"``. An entry changes together with the file of
``benchmarks/results/`` that justifies it.
"""

import torch
from torch import Tensor

from moesaic.ops.native import DTYPES, INSTRUCTION_SETS, Kernels, kernels

# On processors without AVX-512 and its bf16 instructions the kernels run when they are named, but nobody has measured
# whether torch's own products are faster there.
_MEASURED = INSTRUCTION_SETS.index("avx512_bf16")

# Largest average of rows a group.
_FEW, _SOME = 16, 64

_ON_CUDA = {
    "grouped_mm": {"few": "torch", "some": "torch", "many": "torch"},
    "grouped_mm_weight_grad": {"few": "torch", "some": "torch", "many": "torch"},
    "experts_mlp": {"few": "torch", "some": "torch", "many": "torch"},
}


def shape_class(num_rows: int, num_groups: int) -> str:
    """By the average number of rows a group, for on CUDA the numbers themselves are never read to the host."""
    average = num_rows / max(num_groups, 1)
    return "few" if average <= _FEW else "some" if average <= _SOME else "many"


def on_cuda(operator: str, num_rows: int, num_groups: int) -> str:
    """The name of the implementation."""
    return _ON_CUDA[operator][shape_class(num_rows, num_groups)]


def has_cpu_kernels(x: Tensor) -> bool:
    """Whether the kernels of ``csrc/`` are there for operands like ``x``, and measured on this kind of processor."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    loaded = kernels()
    return isinstance(loaded, Kernels) and loaded.isa >= _MEASURED


def is_for_cpu_kernels(x: Tensor, num_rows: int, num_groups: int) -> bool:
    """Whether the kernels of ``csrc/`` are there and the fastest for operands like ``x``.

    Where there is AMX, torch's bf16 products run on its tiles and the kernels do not: they are the faster ones for few
    rows a group alone (``benchmarks/results/fastest_cpu_xeon_1thread.json``).
    """
    if x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and shape_class(num_rows, num_groups) != "few":
        return False
    return has_cpu_kernels(x)
