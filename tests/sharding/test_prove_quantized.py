"""The rules of the operators with quantised weights are right, and complete but for partial scales."""

import json
from pathlib import Path

import pytest
import torch

from moesaic.sharding import on
from tests.sharding.proofs_of_quantized import CALLS

PROGRAM = Path(__file__).with_name("proofs_of_quantized.py")
# One of each kind of operator and line.
QUICK = (
    "quantized_mm, own, nf4, 256",
    "input_grad, own, int8, 13",
    "inference, fewer, mxfp4, 32 x 96",
    "inference, fewer, nf4, 12 x 64",
)


def check(reports: dict) -> None:
    for name, report in reports.items():
        assert report["admitted"], name
        assert (report["wrong"], report["stuck"]) == ([], []), name
        # Of scales the results are linear as well, but no weight is partial.
        unexplained = [(i, o) for i, o, _ in report["missing"] if not any(p.startswith("P") for p in i)]
        assert unexplained == [], name


def test_rules(forked_python):
    check(json.loads(forked_python(PROGRAM, "quickly", *QUICK).stdout))


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_rules_on_2_and_3_ranks_with_gradients(forked_python, name):
    check(json.loads(forked_python(PROGRAM, "thoroughly", name).stdout))


def test_experts_over_one_axis_and_their_matrices_over_the_other():
    found = on(torch.ops.moesaic.quantized_experts_mlp, ep="b", etp="f")  # of one scale for each output
    places = {name: [str(p) for p in found[name]] for name in ("w1", "s1", "w2", "s2", "b2")}
    assert places == {
        "w1": ["S(0)", "S(1)"],
        "s1": ["S(0)", "S(1)"],
        "w2": ["S(0)", "S(2)"],
        "s2": ["S(0)", "R"],
        "b2": ["S(0)", "R"],
    }
