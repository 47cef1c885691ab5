"""What ``impl=None`` goes by: where the CPU kernels are the fastest, and on CUDA what is, by operator and shape class.

**CUDA awaits measurement**: the Triton kernels are compiled for GPUs and checked in an interpreter, and were timed on
none. Until ``benchmarks/gpu`` has run on one, it is ``"torch"`` there. An entry changes together with the file of
``benchmarks/results/`` that justifies it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.native import INSTRUCTION_SETS, Kernels, kernels

# On processors without AVX-512 and its bf16 instructions the kernels run when they are named, but nobody has measured
# whether torch's own products are faster there.
_MEASURED = INSTRUCTION_SETS.index("avx512_bf16")

# Largest average of rows a group.
_FEW, _SOME = 16, 64


class Call(NamedTuple):
    """What a choice depends on.

    Attributes:
        operator: its name in ``torch.ops.moesaic``.
        operands: the tensors that an implementation may refuse; the first has the dtype and the device of all.
        num_rows: of all groups together.
        num_groups: how many there are.
    """

    operator: str
    operands: tuple[Tensor, ...]
    num_rows: int
    num_groups: int


def shape_class(num_rows: int, num_groups: int) -> str:
    """By the average number of rows a group, for on CUDA the numbers themselves are never read to the host."""
    average = num_rows / max(num_groups, 1)
    return "few" if average <= _FEW else "some" if average <= _SOME else "many"


def fastest(call: Call) -> tuple[str, ...]:
    """The names of implementations, the fastest first. The last one takes everything."""
    x = call.operands[0]
    if x.device.type != "cpu" or not isinstance(loaded := kernels(), Kernels) or loaded.isa < _MEASURED:
        return ("torch",)
    # Where there is AMX, torch's bf16 products run on its tiles and the kernels do not: they are the faster ones for
    # few rows a group alone (benchmarks/results/fastest_cpu_xeon_1thread.json). Torch's products cannot add to what is
    # wider than they are, so AMX is of no use there.
    on_tiles = x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    if on_tiles and call.operator != "grouped_mm_accumulate_weight_grad":
        return ("cpu", "torch") if shape_class(call.num_rows, call.num_groups) == "few" else ("torch",)
    return ("cpu", "torch")
