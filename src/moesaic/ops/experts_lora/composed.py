"""experts_lora of quantised weights: composed of operators that take such weights, and differentiated by them.

It keeps the sorted rows of every step for the backward pass, where the operator keeps pre-activations only.

Legend: T tokens, K copies a token (top-k), R rows sorted by expert, D model dim, F hidden dim, E experts; I and O the
dims that a projection comes from and goes to.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.activation import Activation, hidden
from moesaic.ops.experts_mlp.problem import number_by_matrix
from moesaic.ops.grouped_mm.api import grouped_mm
from moesaic.ops.grouped_mm.groups import accumulation_dtype
from moesaic.ops.permute import combine, permute, sort_by_expert


def composed(
    tokens: tuple[Tensor, Tensor, Tensor], given: Mapping[str, Any], activation: Activation, impl: Any
) -> Tensor:
    """The result for ``x [B, T, D]``, ids and routing weights; ``given`` has weights, biases and factors by name."""
    x_BTD, ids_BTK, weights_BTK = tokens
    (B, T, _), E = x_BTD.shape, given["w2"].shape[0]
    ids_TK = number_by_matrix(ids_BTK, -(-E // max(B, 1))).flatten(0, 1)
    if E == 0:
        return torch.zeros_like(x_BTD)
    order = sort_by_expert(ids_TK, E)
    sizes_E, num_rows = order.group_sizes, order.slots.shape[0]
    counts = torch.cat([sizes_E, num_rows - sizes_E.sum(0, keepdim=True)])
    # The rows of copies that are not here belong to no expert, and have the number after the last.
    experts_R = torch.arange(E + 1, device=x_BTD.device).repeat_interleave(counts, output_size=num_rows)

    def project(x_RI: Tensor, number: int) -> Tensor:
        acc = accumulation_dtype(x_RI.dtype)
        y_RO = grouped_mm(x_RI, given[f"w{number}"], sizes_E, impl=impl).to(acc)
        if (a := given.get(f"w{number}_a")) is not None:
            product_impl = None if impl == "reference" else impl
            low_Rr = grouped_mm(x_RI, a, sizes_E, impl=product_impl)
            y_RO = y_RO + grouped_mm(low_Rr, given[f"w{number}_b"], sizes_E, impl=product_impl)
        if (bias_EO := given.get(f"b{number}")) is not None:
            y_RO = y_RO + torch.nn.functional.pad(bias_EO.to(acc), (0, 0, 0, 1)).index_select(0, experts_R)
        return y_RO.to(x_RI.dtype)

    x_RD = permute(x_BTD.flatten(0, 1), order)
    pre = [project(x_RD, number) for number in (1, 3) if given.get(f"w{number}") is not None]
    y_RD = project(hidden(activation, pre), 2)
    return combine(y_RD, order, weights_BTK.flatten(0, 1)).unflatten(0, (B, T))
