"""A token travels once to each other rank, or node, that has some of its experts, with little beside it."""

import pytest
import torch
from benchmarks import node_bytes
from benchmarks.wire_bytes import OURS, THEIRS, TOP_K, UNDER_TRANSFORMERS, CountSent, add_ranks, count_rank

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


@pytest.mark.parametrize(
    ("top_k", "per_node"), [(8, 4), (2, 2), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((8, 2), (2, 4)))]
)
def test_two_hops_are_at_the_bound_of_distinct_nodes(same_ranks, per_node, top_k):
    case = node_bytes.Case(per_node, top_k, dim=2048, tokens=24, rounds=0)
    by_rank = same_ranks(node_bytes.count_rank, node_bytes.RANKS, case, CountSent)
    for row in node_bytes.add_ranks(by_rank, case):
        # A row there and a row back.
        rows = row["across"]["rows"] / (2 * 2048 * 2)
        if row["exchange"] == node_bytes.TWO_HOPS:
            assert row["across"]["rows"] == row["bound"]
            # Ids, weights and the exchange of counts with them.
            assert 1 < row["of_bound"] <= 1.02
        else:
            assert row["of_bound"] > 1.05
        assert rows == pytest.approx(row["expected_rows"], rel=0.15)
