"""torchtitan's Trainer on ranks of these tests' own. `make test-torchtitan` installs what it needs."""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import pytest

from moesaic.testing.pool import Ranks, preload, start_server
from tests.conftest import ROOT

NEEDS = ("torchtitan", "torchdata", "torch_checkpointing", "spmd_types")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
# Its Trainer does not come without these. Tests that need torchtitan's layers alone bring it themselves.
collect_ignore = (
    ["test_balance.py", "test_layouts.py", "test_state.py", "test_ways.py", "test_wire.py"] if MISSING else []
)


@pytest.fixture(scope="session", autouse=True)
def torchtitan_in_the_server() -> None:
    """Ranks are forked from a process that has imported torchtitan."""
    if not MISSING:
        preload("tests.torchtitan.preload")
        start_server()


@pytest.fixture(scope="session")
def alone() -> Iterator[Callable]:
    """`alone(case)`: torchtitan's own on one process, each case once."""
    from tests.torchtitan.case import Case, Record, merged, run

    with Ranks(1) as one:

        @functools.cache
        def record(case: Case) -> Record:
            return merged(one(run, case))

        yield lambda case: record(case.alone())


@pytest.fixture(scope="session")
def differences() -> Iterator[list[str]]:
    """Lines of a table of how far runs differ from stock, which is written when the tests end."""
    lines: list[str] = []
    yield lines
    file = ROOT / "build" / "torchtitan.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))
