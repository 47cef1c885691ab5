"""Fixtures for pytest: put ``pytest_plugins = ["moesaic.testing.fixtures"]`` into ``conftest.py``."""

from collections.abc import Callable
from typing import Any

import pytest

from moesaic.testing.check import Pools, assert_equal_gradients
from moesaic.testing.report import Report


@pytest.fixture(scope="module")
def equal_gradients(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """:func:`moesaic.testing.assert_equal_gradients`, whose checks of one module share their processes."""
    pools = Pools()
    # Not a generator: tools that check types at run time wrap functions, and pytest would not see that it is one.
    request.addfinalizer(pools.stop)  # noqa: PT021

    def check(build: Any, inputs: Any, parallelize: Any, layouts: Any, **options: Any) -> Report:
        return assert_equal_gradients(build, inputs, parallelize, layouts, pools=pools, **options)

    return check
