"""Tests of parallel models: real gloo ranks, and whether gradients on them are those of one process.

:func:`assert_equal_gradients` and ``moesaic check`` take a model and a parallel plan of any library.
"""

from moesaic.testing.check import Pools, assert_equal_gradients, check_gradients
from moesaic.testing.errors import CheckError
from moesaic.testing.layout import Layout, parse_layouts
from moesaic.testing.pool import RankError, Ranks, run_ranks
from moesaic.testing.record import Check
from moesaic.testing.report import Finding, LayoutReport, Report

__all__ = [
    "Check",
    "CheckError",
    "Finding",
    "Layout",
    "LayoutReport",
    "Pools",
    "RankError",
    "Ranks",
    "Report",
    "assert_equal_gradients",
    "check_gradients",
    "parse_layouts",
    "run_ranks",
]
