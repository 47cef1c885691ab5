"""The implementations of grouped_mm.

``"reference"`` is the definition in plain PyTorch, ``"torch"`` is made of torch's own products, ``"cpu"`` has kernels
for fp32 and bf16 (see ``moesaic info``), ``"triton"`` has kernels for CUDA in fp32, bf16 and fp16.
"""

from types import ModuleType
from typing import Literal

from torch import Tensor

from moesaic.ops import native
from moesaic.ops.debug import debug_checks_enabled
from moesaic.ops.fastest import Call
from moesaic.ops.grouped_mm.groups import check_group_sizes
from moesaic.ops.grouped_mm.impl import cpu, reference
from moesaic.ops.grouped_mm.impl import torch as torch_impl
from moesaic.ops.grouped_mm.impl import triton as triton_impl
from moesaic.ops.implementations import Row, choose, takes_all
from moesaic.ops.quantized.weight import Weight
from moesaic.ops.triton import available

# Every operator has these. What an argument `impl` can be, beside None.
Implementation = Literal["reference", "torch", "cpu", "triton"]

IMPLEMENTATIONS: dict[str, Row] = {
    "reference": Row(reference, takes_all),
    "torch": Row(torch_impl, takes_all),
    "cpu": Row(cpu, native.refuses),
    "triton": Row(triton_impl, available.refuses),
}


def module_for(
    operator: str, impl: str | None, operands: tuple[Tensor, Weight], sizes_BG: Tensor, num_matrices: int
) -> ModuleType:
    """What computes this call of an operator; under ``debug_checks`` the sizes are checked first."""
    num_rows = operands[0].shape[0]
    if debug_checks_enabled():
        check_group_sizes(num_rows, sizes_BG, num_matrices)
    return choose(IMPLEMENTATIONS, impl, Call(operator, operands, num_rows, sizes_BG.numel()))
