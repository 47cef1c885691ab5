"""A token travels once to each other rank that has some of its experts, with little beside it."""

import pytest
import torch
from benchmarks.wire_bytes import OURS, THEIRS, TOP_K, UNDER_TRANSFORMERS, add_ranks, count_rank

# Ids (int32) and weights (fp32) of a token's K experts go with it; in bf16 they are more than 2% below D = 800.
DIM, TOKENS = 1024, 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dispatch_is_at_the_lower_bound(ranks, dtype):
    total = add_ranks(ranks(count_rank, 4, DIM, TOKENS, dtype))
    for sent in total[OURS]:
        assert sent.rows == total["bound"]
        assert sum(sent) <= 1.02 * total["bound"]
    assert total[UNDER_TRANSFORMERS] == total[OURS]
    # With what transformers does the counter is compared: a copy for each expert on another rank, there and back.
    for sent in total[THEIRS]:
        copies, rest = divmod(sent.rows, 2 * DIM * dtype.itemsize)
        assert rest == 0
        assert copies == total["copies"]
        assert TOKENS * TOP_K < copies < 4 * TOKENS * TOP_K
