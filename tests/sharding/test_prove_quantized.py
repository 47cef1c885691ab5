"""The rules of the operators with quantised weights are right, and complete but for partial scales."""

import json
from pathlib import Path

import pytest
import torch

from moesaic.sharding import on
from tests.sharding.proofs_of_quantized import CALLS

PROGRAM = Path(__file__).with_name("proofs_of_quantized.py")
# One of each operator and kind of line. The fused ones have so many tensors that they take long on more ranks.
SOME = {
    "quantized_mm, own, nf4, 256": (2, 3, 4),
    "input_grad, own, int8, 13": (2, 3, 4),
    "experts, fewer, mxfp4, 32 x 96": (2,),
    "inference, fewer, nf4, 12 x 64": (2,),
    "backward, biased, mxfp4, 32 x 96": (2,),
    "lora, biased, int8, 6 x 7": (2,),
    "backward of lora, biased, nf4, 64 x 256": (2,),
}


def check(report: dict) -> None:
    assert report["admitted"]
    assert (report["wrong"], report["stuck"]) == ([], [])
    # Of scales the results are linear as well, but no weight is partial.
    assert [(i, o) for i, o, _ in report["missing"] if not any(p.startswith("P") for p in i)] == []


SLOWEST = "backward of lora, biased, nf4, 64 x 256"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name == SLOWEST else []) for name in SOME]
)
def test_rules(forked_python, name):
    check(json.loads(forked_python(PROGRAM, name, *SOME[name]).stdout))


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_rules_on_2_and_3_ranks(forked_python, name):
    check(json.loads(forked_python(PROGRAM, name, 2, 3).stdout))


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
