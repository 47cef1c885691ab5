"""Bringing rows back costs a few launches and hardly more bytes than the rows have, on however many ranks they were."""

import pytest
import torch
from benchmarks.moved import Moved
from torch import Tensor

from moesaic.ops.permute import kernels

# Tokens, the ranks they go to at most, model dim.
T, Q, D = 8192, 8, 4096


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_and_launches_of_combine(dtype):
    rows = 6 * T
    with Moved() as moved:
        kernels.combine(meta(rows, D, dtype=dtype), meta(rows), meta(T, Q))
    assert moved.bytes <= 1.2 * (rows + T) * D * dtype.itemsize
    assert moved.launches <= 12


@pytest.mark.parametrize(
    ("run", "launches", "size"),
    [
        (lambda: meta(6, 4)[2:].t().unsqueeze(0), 0, 0),
        (lambda: meta(6, 4).add(meta(4)), 1, (24 + 4 + 24) * 8),
        (lambda: meta(1, 4).expand(6, 4) + 1, 1, (4 + 24) * 8),
        (lambda: meta(6, 4).index_select(0, meta(3)), 1, (3 + 12 + 12) * 8),
        (lambda: meta(6, 4).fill_(0), 1, 24 * 8),
        (lambda: meta(6, 4).masked_fill_(meta(6, 1, dtype=torch.bool), 0), 1, 6 + 2 * 24 * 8),
        (lambda: meta(6, 4).sum(1), 1, (24 + 6) * 8),
        (lambda: meta(6, 4, dtype=torch.bfloat16).float(), 1, 24 * (2 + 4)),
        (lambda: meta(6, 4, dtype=torch.float32) @ meta(4, 5, dtype=torch.float32), 1, 0),
        (lambda: torch.ops.aten._embedding_bag_forward_only(meta(6, 4, dtype=torch.float32), meta(5), meta(3)), 1, 208),
    ],
)
def test_the_counter_counts_as_one_does_by_hand(run, launches, size):
    with Moved() as moved:
        run()
    assert (moved.launches, moved.bytes) == (launches, size)
