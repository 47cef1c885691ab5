"""Token copies sorted by expert, on the device: what the kernels of experts_mlp are told of a routing.

Torch's own operations, none of which waits for the device.

Legend: T tokens, K copies a token (top-k), R = T * K rows sorted by expert, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.triton.maps import Groups


class Routing(NamedTuple):
    """Slot ``t * K + k`` is copy ``k`` of token ``t``. Rows of copies that are not here come last.

    Attributes:
        slots: ``[R]`` int32, the slot of each row.
        tokens: ``[R]`` int32, the token of each row.
        positions: ``[T, K]`` int32, the row of each slot, -1 for a copy that is not here.
        groups: where the rows of each expert lie.
    """

    slots: Tensor
    tokens: Tensor
    positions: Tensor
    groups: Groups


def route(ids_TK: Tensor, num_experts: int) -> Routing:
    """Sort stably: the order, and with it every rounding error, depends on the routing alone."""
    (T, K), E, R = ids_TK.shape, num_experts, ids_TK.numel()
    is_here = (ids_TK >= 0) & (ids_TK < E)
    # A radix sort takes time by the width of its keys.
    narrow = torch.int16 if E + 1 < 2**15 else torch.int32
    keys = torch.where(is_here, ids_TK, E).flatten().to(narrow)
    keys, order = torch.sort(keys, stable=True)
    firsts = torch.arange(E + 2, dtype=narrow, device=ids_TK.device)
    bounds = torch.searchsorted(keys, firsts, out_int32=True)
    rows = torch.arange(R, dtype=torch.int32, device=ids_TK.device)
    positions = torch.empty_like(rows).scatter_(0, order, rows).view(T, K)
    slots = order.to(torch.int32)
    groups = Groups(bounds.unsqueeze(0), E, False, R)
    return Routing(slots, slots // max(K, 1), torch.where(is_here, positions, -1), groups)
