"""grouped_mm as ``bmm`` over row tiles: any dtype, any device, group sizes never read to the host.

Every group is cut into tiles of ``TILE`` rows. How many tiles a group has is known to the device alone, but their total
is at most ``ceil(R / TILE) + groups``, so a map of that many tiles, some of them empty, is built without a host read.
Each tile meets a copy of its expert's weight, a bounded number of tiles at a time.

Legend: R rows, B blocks, G groups a block, S tiles, M rows a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.grouped_mm.groups import accumulation_dtype, are_shared
from moesaic.ops.quantized.weight import Weight

TILE = 64
# Bytes of weight copies alive at a time.
_CHUNK_BYTES = 2**28


class TileMap(NamedTuple):
    """``rows_SM[i]``: the rows of tile ``i``, ``R`` where it has none; ``experts_S[i]``: the weight it meets."""

    rows_SM: Tensor
    experts_S: Tensor


def tile_map(num_rows: int, sizes_BG: Tensor, num_matrices: int) -> TileMap:
    """Cut the groups that have an expert into tiles, on the sizes' own device."""
    device = sizes_BG.device
    B, G = sizes_BG.shape
    shared = are_shared(num_matrices, sizes_BG)
    sizes_BG = sizes_BG.to(torch.int64)
    first_rows_B1 = torch.arange(B, device=device).unsqueeze(1) * (num_rows // max(B, 1))
    ends = (first_rows_B1 + sizes_BG.cumsum(1)).flatten()
    starts = ends - sizes_BG.flatten()
    tile_ends = ((sizes_BG.flatten() + TILE - 1) // TILE).cumsum(0)
    num_groups = B * G if shared else min(B * G, num_matrices)
    tiles_S = torch.arange(-(-num_rows // TILE) + num_groups, device=device)
    # Past the tiles of the last group with an expert come those of groups without, which find no rows in it.
    groups_S = torch.searchsorted(tile_ends, tiles_S, right=True).clamp_(max=num_groups - 1)
    first_tile_S = torch.where(groups_S > 0, tile_ends[groups_S - 1], 0)
    rows_SM = (starts[groups_S] + (tiles_S - first_tile_S) * TILE).unsqueeze(1) + torch.arange(TILE, device=device)
    rows_SM = torch.where(rows_SM < ends[groups_S].unsqueeze(1), rows_SM, num_rows)
    return TileMap(rows_SM, groups_S % G if shared else groups_S)


def forward(x_RK: Tensor, w_EKN: Weight, sizes_BG: Tensor, out_dtype: torch.dtype) -> Tensor:
    R, N = x_RK.shape[0], w_EKN.shape[2]
    # Tiles read zeros from, and write to, one row more than there is where they have no row.
    y_RN = x_RK.new_zeros(R + 1, N, dtype=out_dtype)
    if min(R, N, sizes_BG.numel(), w_EKN.shape[0]) == 0:
        return y_RN[:R]
    x_RK = torch.cat([x_RK, x_RK.new_zeros(1, x_RK.shape[1])]).to(out_dtype)
    tiles = tile_map(R, sizes_BG, w_EKN.shape[0])
    for rows_SM, experts_S in _chunks(tiles, w_EKN[0].numel() * x_RK.element_size()):
        y_RN[rows_SM] = torch.bmm(x_RK[rows_SM], w_EKN[experts_S].to(out_dtype))
    return y_RN[:R]


def weight_grad(x_RK: Tensor, grad_RN: Tensor, sizes_BG: Tensor, num_matrices: int) -> Tensor:
    R, K, N = *x_RK.shape, grad_RN.shape[1]
    acc = accumulation_dtype(x_RK.dtype)
    gw_EKN = x_RK.new_zeros(num_matrices, K, N, dtype=acc)
    if min(R, sizes_BG.numel(), gw_EKN.numel()) == 0:
        return gw_EKN.to(x_RK.dtype)
    x_RK = torch.cat([x_RK, x_RK.new_zeros(1, K)])
    grad_RN = torch.cat([grad_RN, grad_RN.new_zeros(1, N)])
    for rows_SM, experts_S in _chunks(tile_map(R, sizes_BG, num_matrices), K * N * gw_EKN.element_size()):
        partial_SKN = torch.bmm(x_RK[rows_SM].mT.to(acc), grad_RN[rows_SM].to(acc))
        # On CUDA index_put sorts its indices where index_add would use atomics: the same bits every time. (On CPU it
        # is index_put that uses atomics, above a size and in fp32; CPU tensors do not come here but in tests.)
        gw_EKN.index_put_((experts_S,), partial_SKN, accumulate=True)
    return gw_EKN.to(x_RK.dtype)


def _chunks(tiles: TileMap, bytes_per_tile: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK_BYTES // max(bytes_per_tile, 1))
    return zip(tiles.rows_SM.split(size), tiles.experts_S.split(size), strict=True)
