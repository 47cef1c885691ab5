"""A row of the up projection by groups of warps, in Gluon, which is off by default: is it right, and is it faster?"""

import functools
import os
from typing import Any
from unittest import mock

import torch
from benchmarks.gpu import common
from benchmarks.gpu.common import DRY_RUN
from benchmarks.gpu.layer import OURS, Case, WrongError, contenders
from benchmarks.gpu.shapes import Shape


def measure(row: dict[str, Any], shape: Shape, tokens: int, routing: str) -> None:
    """Fill the row, as far as it gets. Sums are added in the same order, so even the bits may be equal."""
    if DRY_RUN or torch.cuda.get_device_capability()[0] != 9:
        row["left out"] = "it is for compute capability 9.x, and no interpreter runs it"
        return
    contender = contenders(shape)[1][OURS]
    case = Case.of(shape, tokens, routing)
    expected = case.results(contender)
    forward, both = (functools.partial(run, contender) for run in (case.forward, case.both))
    row["fwd ms, default"], row["fwd+bwd ms, default"] = common.milliseconds(forward), common.milliseconds(both)
    with mock.patch.dict(os.environ, MOESAIC_TRITON_WARPS="1"):
        with common.poisoned():
            found = case.results(contender)
        row["apart"] = max(common.error(t, expected[name]) for name, t in found.items())
        row["bits"] = "equal" if all(torch.equal(t, expected[name]) for name, t in found.items()) else "other"
        if not row["apart"] < 5e-3:
            raise WrongError(f"results differ from those of the default kernel by {row['apart']:.2g}")
        if not all(torch.equal(t, found[name]) for name, t in case.results(contender).items()):
            raise WrongError("two runs differ")
        row["fwd ms"], row["fwd+bwd ms"] = common.milliseconds(forward), common.milliseconds(both)
    row["checked"] = "the default kernel, bits twice"
