"""When rows go over nodes first: the numbers that decide it. No process group."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesaic
from moesaic.parallel.nodes import expected_rows


@given(
    nodes=st.integers(1, 3),
    size=st.integers(1, 3),
    num_groups=st.integers(1, 4),
    group=st.integers(1, 8),
    data=st.data(),
)
def test_expected_rows_are_the_mean_over_all_choices(nodes, size, num_groups, group, data):
    group = min(group, 8 // num_groups)
    top_groups = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, top_groups * group))
    num_experts = num_groups * group
    each = -(-num_experts // (nodes * size))
    one = two = number = 0
    for groups in itertools.combinations(range(num_groups), top_groups):
        among = [expert for expert in range(num_experts) if expert // group in groups]
        for own, choice in itertools.product(range(nodes), itertools.combinations(among, top_k)):
            away = {expert // each for expert in choice if expert // each // size != own}
            one += len(away)
            two += len({rank // size for rank in away})
            number += 1
    rows = expected_rows(nodes, size, num_experts, top_k, num_groups, top_groups)
    assert rows == pytest.approx((one / number, two / number))


@pytest.mark.parametrize(("value", "said"), [(2, "choose one of 1$"), (0, "got 0, and there are 1 ranks")])
def test_one_process_has_one_rank_on_its_node(value, said):
    with pytest.raises(ValueError, match=f"ranks_per_node: .*{said}"):
        moesaic.build_meshes(ranks_per_node=value)
    assert moesaic.build_meshes(ranks_per_node=1).nodes.groups is None
