"""Ranks that share values and failures."""

import traceback

import pytest

from moesaic import ranks as shared


class _Unportable(OSError):
    """Pickles, and cannot be read again."""

    def __init__(self, number, text):
        super().__init__(text)


def _caught(work, *arguments):
    try:
        work(*arguments)
    except Exception as error:
        return type(error).__name__, "".join(traceback.format_exception_only(error))
    return None


def _fail_on_1(error_type):
    def work():
        if shared.rank() == 1:
            raise error_type(1, "disk full")

    return _caught(shared.together, work)


@pytest.mark.parametrize(
    ("error_type", "others"), [(PermissionError, "PermissionError"), (_Unportable, "RuntimeError")], ids=str
)
def test_all_ranks_raise_what_one_raised_and_say_where(ranks, error_type, others):
    failed = ranks(_fail_on_1, 3, error_type)
    assert [kind for kind, _ in failed] == [others, error_type.__name__, others]
    assert all("disk full" in text for _, text in failed)
    assert ["on rank 1" in text for _, text in failed] == [True, False, True]


def _values():
    own = shared.rank()
    return {
        "leader": shared.is_leader(),
        "together": shared.together(lambda: own),
        "on_leader": shared.on_leader(lambda: f"made by {own}"),
        "from_leader": shared.from_leader(own),
        "agree": [_caught(shared.agree, own // 2, "halves"), _caught(shared.agree, 7, "sevens")],
        "agree by name": _caught(
            shared.agree, {"same": 1, "lr": own // 2} | ({"new": 3} if own == 2 else {}), "settings"
        ),
        "share_failure": _caught(shared.share_failure, OSError("rank 1") if own == 1 else None),
    }


def test_values_are_shared(ranks):
    first, second, third = ranks(_values, 3)
    assert [first["leader"], second["leader"], third["leader"]] == [True, False, False]
    for said in (first, second, third):
        assert said["together"] == [0, 1, 2]
        assert said["on_leader"] == "made by 0"
        assert said["from_leader"] == 0
        different, same = said["agree"]
        assert different[0] == "ValueError"
        assert "ranks 0 and 2 have different halves" in different[1]
        assert same is None
        assert "different settings: lr is 0 and 1, new is not there and 3; give" in said["agree by name"][1]
        assert said["share_failure"][0] == "OSError"


def test_without_a_process_group_there_is_one_rank():
    assert _values() == {
        "leader": True,
        "together": [0],
        "on_leader": "made by 0",
        "from_leader": 0,
        "agree": [None, None],
        "agree by name": None,
        "share_failure": None,
    }
