"""The exchange of tokens sends fewer bytes than torchtitan's, and nothing else sends more."""

from tests.torchtitan.case import Case
from tests.torchtitan.wire import add, sent_in_a_step


def test_a_step_sends_less(same_ranks):
    stock = add(same_ranks(sent_in_a_step, 4, Case("qwen3_64", ep=4, steps=2)))
    ours = add(same_ranks(sent_in_a_step, 4, Case("qwen3_64", "routed_experts", ep=4, steps=2)))
    kept = add(same_ranks(sent_in_a_step, 4, Case("qwen3_64", "experts", ep=4, steps=2)))
    assert kept == stock
    # 8 of 64 experts on 4 ranks: a copy for each expert on another rank is 6 of 8 on average; a rank gets 1 at most.
    assert ours["all-to-all"] < 0.6 * stock["all-to-all"]
    assert {k: v for k, v in ours.items() if "all-to-all" not in k and v > 1.01 * stock[k]} == {}
