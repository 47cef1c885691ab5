"""Which implementations of grouped_mm and experts_mlp take quantised weights.

``"reference"`` and ``"torch"`` decode a matrix when they come to it.
"""

from collections.abc import Callable, Mapping
from types import ModuleType

from torch import Tensor

from moesaic.ops.debug import debug_checks_enabled
from moesaic.ops.fastest import Call
from moesaic.ops.grouped_mm.groups import check_group_sizes
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS
from moesaic.ops.implementations import Row, choose


def for_quantized(table: Mapping[str, Row]) -> dict[str, Row]:
    """An operator's implementations, of which those that read a tensor's memory refuse what is none."""
    return {name: Row(row.module, _refusals.get(name, row.refuses)) for name, row in table.items()}


def _has_none(name: str) -> Callable[..., Exception]:
    def refuses(*operands: object) -> Exception:
        return TypeError(f'impl: "{name}" has no kernels for quantised weights; use "torch" or None')

    return refuses


_refusals = {name: _has_none(name) for name in ("cpu", "triton")}
_TABLE = for_quantized(IMPLEMENTATIONS)


def module_for_product(operator: str, impl: str | None, x: Tensor, sizes_BG: Tensor, num_matrices: int) -> ModuleType:
    """What computes this call of a product; under ``debug_checks`` the sizes are checked first."""
    num_rows = x.shape[0]
    if debug_checks_enabled():
        check_group_sizes(num_rows, sizes_BG, num_matrices)
    return choose(_TABLE, impl, Call(operator, (x,), num_rows, sizes_BG.numel()))
