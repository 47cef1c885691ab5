"""Fixtures of the operators' tests."""

import pytest
import torch


@pytest.fixture
def threads():
    """Sets the number of threads; at the end it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
