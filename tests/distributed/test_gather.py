"""Rows of all ranks are gathered without a copy of them for each rank, and their gradients are those of the whole."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from moesaic.parallel.collectives import all_gather_rows, sent_bytes
from moesaic.plan.ledger import Ledger

D = 64


def gathered(sizes: list[int], even: bool) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """What a gather gives, its gradient, the bytes of rows that were sent, and those in memory at most beside them."""
    group, rank = dist.group.WORLD, dist.get_rank()
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    [*parts] = (torch.arange(a * D, b * D).view(-1, D).double() for a, b in pairwise(ends))
    # As attention has it: not in the order of its rows.
    x = parts[rank].t().contiguous().t().requires_grad_()
    before = sent_bytes()
    with Ledger(x) as ledger:
        y = all_gather_rows(x, sizes, group, even=even)
        ledger.mark("gathered")
    sent = sent_bytes() - before
    (y * (rank + 1)).sum().backward()
    return y.detach(), x.grad, sent, ledger.marks["gathered"].peak


@pytest.mark.parametrize("sizes", [[3, 0, 5, 2], [4, 4, 4, 4]], ids=str)
def test_no_row_is_repeated(same_ranks, sizes):
    even = len(set(sizes)) == 1
    whole = torch.arange(sum(sizes) * D).view(-1, D).double()
    for rank, (y, grad, sent, peak) in enumerate(same_ranks(gathered, 4, sizes, even)):
        assert torch.equal(y, whole)
        assert torch.equal(grad, torch.full((sizes[rank], D), 1.0 + 2 + 3 + 4).double())
        row = D * 8
        assert sent == 3 * sizes[rank] * row
        # Its own rows in order, those of the others where they come, and all of them together.
        others = 0 if even else sum(sizes) - sizes[rank]
        assert peak == (sizes[rank] + others + sum(sizes)) * row
