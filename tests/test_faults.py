"""The table of planted faults fits the source; `python -m tests.faults` tries them."""

import pytest

from tests.faults import FAULTS, ROOT, changed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_is_there_once_and_the_tests_exist(fault):
    file = ROOT / "src" / "moesaic" / fault.file
    assert changed(file.read_text(), fault) != file.read_text()
    for test in fault.tests:
        path, *names = test.partition("[")[0].split("::")
        assert all(f"def {name}(" in (ROOT / path).read_text() for name in names)
