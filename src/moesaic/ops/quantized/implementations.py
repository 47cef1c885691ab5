"""Which implementation computes with quantised weights.

``"cpu"`` decodes them in registers. ``"reference"`` and ``"torch"`` decode a matrix when they come to it, which writes
it to memory and reads it again. So where there are kernels they are taken, whatever is fastest for other weights.
"""

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from moesaic.ops.debug import debug_checks_enabled
from moesaic.ops.fastest import Call
from moesaic.ops.grouped_mm.groups import check_group_sizes
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS
from moesaic.ops.implementations import Row, choose
from moesaic.ops.quantized.weight import QuantizedWeight


def choose_for_quantized(table: Mapping[str, Row], impl: str | None, call: Call) -> ModuleType:
    """The module of the implementation called ``impl``; for None the kernels, or else torch's products."""
    if impl is None:
        impl = "torch" if table["cpu"].refuses(*call.operands) is not None else "cpu"
    return choose(table, impl, call)


def module_for_product(operator: str, impl: str | None, x: Tensor, w: QuantizedWeight, sizes_BG: Tensor) -> ModuleType:
    """What computes this call of a product; under ``debug_checks`` the sizes are checked first."""
    num_rows = x.shape[0]
    if debug_checks_enabled():
        check_group_sizes(num_rows, sizes_BG, w.shape[0])
    return choose_for_quantized(IMPLEMENTATIONS, impl, Call(operator, (x, w), num_rows, sizes_BG.numel()))
