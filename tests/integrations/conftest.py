"""Fixtures of the tests of the plug-in."""

import pytest

from tests.integrations.families import make_model


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """The folder of a tiny Mixtral, which no test changes."""
    folder = tmp_path_factory.mktemp("mixtral")
    make_model("Mixtral").save_pretrained(folder)
    return folder
