"""Benchmarks on a GPU. They run from a checkout that is not installed, too: its sources are found beside them."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("moesaic") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
