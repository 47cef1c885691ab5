"""A group that only its ranks make leaves all others as they are."""

from datetime import timedelta

import torch
import torch.distributed as dist

from moesaic.sharding.internals import all_reduce, group_that_its_ranks_make


def check() -> tuple[int, float]:
    some = group_that_its_ranks_make([1]) if dist.get_rank() == 1 else None
    # Of the next group both ranks have to make up the same name.
    both = dist.new_group([0, 1], timeout=timedelta(seconds=10))
    return 0 if some is None else some.size(), all_reduce(torch.ones(()), both).item()


def test_other_groups_keep_their_names(ranks):
    assert ranks(check, 2) == [(0, 2.0), (1, 2.0)]
