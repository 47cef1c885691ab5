"""Layouts: how many ranks they take, which ranks an axis joins, and texts."""

import pytest

from moesaic.testing import CheckError, Layout, parse_layouts
from moesaic.testing.hangs import where


def test_the_number_of_ranks_follows_from_both_views():
    layouts = parse_layouts("tp=2,ep=2 ; ep=4,etp=1; tp=2,ep=2,world=4 ; sp=3")
    assert [layout.world for layout in layouts] == [2, 4, 4, 3]
    assert [dict(layout) for layout in layouts][2] == {"tp": 2, "ep": 2}
    assert layouts[2].place(3) == {"dp": 1, "tp": 1, "edp": 1, "ep": 1}
    assert Layout().world == 1


def test_groups_of_ranks_by_axes():
    groups = Layout({"dp": 2, "tp": 2, "ep": 4}).groups()
    assert groups == {"dp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]], "ep or dp x tp": [[0, 1, 2, 3]]}
    assert [Layout({"dp_replicate": 2, "dp_shard": 2}).rows(r, 8) for r in (0, 3)] == [slice(0, 2), slice(6, 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp", "expected axis=size"),
        ("tp=0", "tp must be an integer of at least 1"),
        ("tp=16", "takes 16 ranks; a check starts 1 to 8"),
        ("tp=3,world=4", "tp = 3 must divide the number of ranks, 4"),
        ("dp=2,ep=4", "dp = 2, and there are 4 ranks; leave dp out"),
        (" ; ", "there is none"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(text, message):
    with pytest.raises(CheckError, match=message):
        parse_layouts(text)


def test_a_stack_says_which_collective_a_rank_waits_in():
    stack = """Current thread 0x1 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 3197 in all_reduce
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/model.py", line 12 in forward
  File "/x/torch/nn/modules/module.py", line 1790 in _call_impl
"""
    assert where(stack) == "waiting in all_reduce, called from model.py:12 in forward"
    assert where(stack[stack.index('  File "/home') :]) == "not in a collective, called from model.py:12 in forward"
