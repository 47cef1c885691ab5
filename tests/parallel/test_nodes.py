"""When rows go over nodes first: the numbers that decide it. No process group."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesaic
from moesaic.parallel.nodes import expected_rows


@given(nodes=st.integers(1, 3), size=st.integers(1, 3), num_experts=st.integers(1, 8), data=st.data())
def test_expected_rows_are_the_mean_over_all_choices(nodes, size, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    each = -(-num_experts // (nodes * size))
    ranks = [expert // each for expert in range(num_experts)]
    one = two = 0
    choices = list(itertools.combinations(ranks, top_k))
    for own, choice in itertools.product(range(nodes), choices):
        away = {rank for rank in choice if rank // size != own}
        one += len(away)
        two += len({rank // size for rank in away})
    number = nodes * len(choices)
    assert expected_rows(nodes, size, num_experts, top_k) == pytest.approx((one / number, two / number))


@pytest.mark.parametrize(("value", "said"), [(2, "choose one of 1$"), (0, "got 0, and there are 1 ranks")])
def test_one_process_has_one_rank_on_its_node(value, said):
    with pytest.raises(ValueError, match=f"ranks_per_node: .*{said}"):
        moesaic.build_meshes(ranks_per_node=value)
    assert moesaic.build_meshes(ranks_per_node=1).nodes.groups is None
