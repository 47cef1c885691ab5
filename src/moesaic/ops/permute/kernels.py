"""What the permutation operators compute, in torch's own operations.

They gather through an index and never scatter with atomics, so they are deterministic on every device.

Legend: T tokens, K copies a token (top-k), R rows, D model dim, E experts.
"""

import torch
from torch import Tensor

from moesaic.ops.arguments import check_fit
from moesaic.ops.debug import debug_checks_enabled
from moesaic.ops.grouped_mm.groups import accumulation_dtype

# Elements that are multiplied at a time.
_CACHED = 1 << 17
_AT_ONCE = 1 << 28


def sort_by_expert(ids: Tensor, num_experts: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    check_fit("sort_by_expert", [("ids", ids, "TK")])
    if num_experts < 0 or num_rows < 0:
        raise ValueError(f"sort_by_expert: num_experts and num_rows: at least 0, got {num_experts} and {num_rows}")
    flat = ids.flatten().to(torch.int64)
    valid = (flat >= 0) & (flat < num_experts)
    key = torch.where(valid, flat, num_experts)
    order = torch.sort(key, stable=True).indices
    group_sizes_E = key.new_zeros(num_experts + 1).scatter_add_(0, key, torch.ones_like(key))[:num_experts]
    num_valid = group_sizes_E.sum()
    if (ids.device.type == "cpu" or debug_checks_enabled()) and int(num_valid) > num_rows:
        raise ValueError(f"num_rows: {num_rows} rows cannot hold the {int(num_valid)} routed token copies")
    rows = torch.arange(flat.numel(), device=ids.device)
    positions = torch.empty_like(order).scatter_(0, order, rows)
    positions = torch.where(valid, positions, -1).view(ids.shape)
    slots = torch.where(rows < num_valid, order, -1)[:num_rows]
    slots = torch.nn.functional.pad(slots, (0, num_rows - slots.numel()), value=-1)
    return slots, positions, group_sizes_E.clone()


def permute(x: Tensor, slots: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    _check("permute", ("x", x, "TD"), slots, positions, weights)
    K = positions.shape[1]
    if x.shape[0] == 0 or K == 0:
        return x.new_zeros(slots.shape[0], x.shape[1])
    y_RD = x.index_select(0, slots.clamp(min=0) // K)
    if weights is not None:
        weight_R = weights.flatten().index_select(0, slots.clamp(min=0))
        acc = accumulation_dtype(x.dtype)
        y_RD = (y_RD.to(acc) * weight_R.to(acc).unsqueeze(1)).to(x.dtype)
    if slots.is_cpu:
        # No pass over rows that stay as they are.
        padding = (slots < 0).nonzero().squeeze(1)
        return y_RD.index_fill_(0, padding, 0) if len(padding) else y_RD
    return y_RD.masked_fill_((slots < 0).unsqueeze(1), 0)


def combine(y: Tensor, slots: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    _check("combine", ("y", y, "RD"), slots, positions, weights)
    if y.numel() == 0 or positions.numel() == 0:
        return y.new_zeros(positions.shape[0], y.shape[1])
    is_here = positions >= 0
    rows = _compact(positions, is_here)
    if weights is None:
        return _sum_of_bags(y, rows, is_here)
    # torch's bags have weights of the rows' dtype, and of half types their sums are less exact on the CPU, by a unit in
    # the last place. So rows of these are summed as fp32 ones.
    acc = accumulation_dtype(y.dtype)
    return _sum_of_bags(y.to(acc), rows, is_here, _compact(weights.to(acc), is_here)).to(y.dtype)


def _sum_of_bags(y: Tensor, rows: Tensor, is_here: Tensor, weights: Tensor | None = None) -> Tensor:
    """For each token the sum over its rows: one pass that reads every row once, in the order of k.

    Half types are accumulated in fp32 and rounded once. Deterministic: a token's sum is made by one thread.
    """
    firsts = torch.nn.functional.pad(is_here.sum(1).cumsum(0), (1, 0))
    sums, *_ = torch.ops.aten._embedding_bag_forward_only(
        y, rows, firsts, mode=0, per_sample_weights=weights, include_last_offset=True
    )
    return sums


def _compact(t_TK: Tensor, is_here: Tensor) -> Tensor:
    """The values of the copies that are here, in the order of slots; on CPU no others.

    Elsewhere zeros follow, which belong to no bag: how many are here is not read to the host.
    """
    flat, is_here = t_TK.flatten(), is_here.flatten()
    if t_TK.is_cpu:
        return flat[is_here]
    place = torch.where(is_here, is_here.cumsum(0) - 1, flat.numel())
    return flat.new_zeros(flat.numel() + 1).scatter_(0, place, flat)[:-1]


def combine_weight_grad(y: Tensor, x: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    check_fit(
        "combine_weight_grad", [("y", y, "RD"), ("x", x, "TD"), ("slots", slots, "R"), ("positions", positions, "TK")]
    )
    acc = accumulation_dtype(y.dtype)
    if not y.shape[0] or not positions.numel():
        return y.new_zeros(positions.shape, dtype=acc)
    # Of rows, which may be far fewer than copies. So many at a time that on a CPU they stay in the cache.
    tokens_R, most = slots.clamp(min=0) // positions.shape[1], _CACHED if y.is_cpu else _AT_ONCE
    rows = max(most // max(y.shape[1], 1), 1)
    dots = [
        (y_rD.to(acc) * x.index_select(0, tokens_r)).sum(1)
        for y_rD, tokens_r in zip(y.split(rows), tokens_R.split(rows), strict=True)
    ]
    dots_R = torch.cat(dots)
    gw_TK = dots_R.index_select(0, positions.flatten().clamp(min=0)).view(positions.shape)
    return gw_TK.masked_fill_(positions < 0, 0)


def _check(
    operator: str, rows: tuple[str, Tensor, str], slots: Tensor, positions: Tensor, weights: Tensor | None
) -> None:
    check_fit(operator, [rows, ("slots", slots, "R"), ("positions", positions, "TK"), ("weights", weights, "TK")])
