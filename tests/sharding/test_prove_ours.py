"""The rules of our own operators are right, and complete but for what is left out on purpose."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import moesaic
from tests.sharding.proofs_of_ours import CALLS, with_lists

pytestmark = pytest.mark.slow

FORWARD = [f"grouped_mm, {form}" for form in ("flat", "own", "fewer", "shared")]
BACKWARD = [f"{op}, {form}" for op in ("input_grad", "weight_grad") for form in ("flat", "own", "shared")]
FUSED = [f"{op}, {form}" for op in ("experts_mlp", "inference") for form in ("biased", "plain", "fewer")]
FUSED += ["experts_backward, biased", "inference, listed"]
PERMUTING = ["permute", "permute, weighted", "combine", "combine, weighted", "combine_weight_grad", "sort_by_expert"]


def is_reduced(placements):
    """Whether one of them is Partial. (A rule passes Partial through to all results or to none.)"""
    return any(p.startswith("P") for p in placements)


# Right, and not admitted: by operator, why, and which placements of inputs and results. Nothing else may be missing.
DELIBERATE = {
    "permute": {
        "positions are not read, but the gradient reads them": lambda x, slots, positions, *_: positions != "R",
        "rows in shards, of which the gradient needs all": lambda x, slots, *_: slots == "S(0)",
        "no layer has tokens that are largest or smallest": lambda x, *_: x in ("P(max)", "P(min)"),
    },
    "combine": {
        "slots are not read, but the gradient reads them": lambda y, slots, *_: slots != "R",
        "tokens in shards, of which the gradient needs all": lambda y, slots, positions, *_: positions == "S(0)",
        "copies in shards: a rank has all copies of a token": lambda y, slots, positions, *_: positions == "S(1)",
    },
    "experts_mlp": {
        "the pre-activations are not linear in what the result is linear in": lambda *all: is_reduced(all[:-3]),
    },
    "inference": {
        "linear with most activations, but clamped_swiglu clamps what is not": (
            lambda x, ids, weights, experts, w1, w3, w2, *biases: is_reduced((w3, *biases[1:2]))
        ),
    },
    "experts_backward": {
        "one gradient or another is not linear in it": lambda grad, *others: is_reduced(others[:12]),
    },
}


@pytest.fixture(scope="module")
def found(forked_python):
    program = Path(__file__).with_name("proofs_of_ours.py")
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda name: forked_python(program, name), CALLS)
    return {name: json.loads(of.stdout) for name, of in zip(CALLS, done, strict=True)}


@pytest.mark.parametrize("name", FORWARD + BACKWARD + PERMUTING + FUSED)
def test_nothing_is_wrong(found, name):
    assert found[name]["wrong"] == []
    assert found[name]["admitted"]


@pytest.mark.parametrize("name", FORWARD + BACKWARD + PERMUTING + FUSED)
def test_nothing_is_missing_but_on_purpose(found, name):
    reasons = DELIBERATE.get(name.partition(",")[0], {})
    unexplained = []
    for inputs, outputs, _ in found[name]["missing"]:
        if not any(reason(*inputs, *outputs) for reason in reasons.values()):
            unexplained.append((inputs, outputs))
    assert not unexplained


@pytest.mark.parametrize("op", DELIBERATE)
def test_every_reason_is_needed(found, op):
    missing = [r for name in found if name.partition(",")[0] == op for r in found[name]["missing"]]
    for why, reason in DELIBERATE[op].items():
        others = [f for f in DELIBERATE[op].values() if f is not reason]
        alone = [r for r in missing if reason(*r[0], *r[1]) and not any(f(*r[0], *r[1]) for f in others)]
        assert alone, why


@pytest.mark.parametrize("name", FORWARD)
def test_grouped_mm_moves_nothing(found, name):
    assert found[name]["hidden"] == []
    assert all(note.startswith(("no example", "every example has")) for note in found[name]["notes"])
    assert {len(inputs[0].split()) for inputs, _, _ in found[name]["admitted"]} == {1, 2}


def test_every_line_of_grouped_mm_is_reached(found):
    lines = [{note for note in found[name]["notes"] if "no example uses the line" in note} for name in FORWARD]
    assert all(lines)
    assert set.intersection(*lines) == set()


def test_experts_over_one_axis_and_their_matrices_over_the_other(found):
    admitted = [(inputs, outputs) for inputs, outputs, _ in found["grouped_mm, own"]["admitted"]]
    assert (["S(0) R", "S(0) S(2)", "S(0) R"], ["S(0) S(1)"]) in admitted
    assert (["S(0) S(1)", "S(0) S(1)", "S(0) R"], ["S(0) P"]) in admitted


def test_experts_mlp_is_expert_token_and_tensor_parallel(found):
    admitted = [(inputs, outputs) for inputs, outputs, _ in found["experts_mlp, fewer"]["admitted"]]
    assert (["S(0)"] * 7, ["S(0)"] * 3) in admitted
    assert (["S(1)"] * 3 + ["R"] * 4, ["S(1)"] * 3) in admitted
    assert (["R"] * 4 + ["S(2)", "S(2)", "S(1)"], ["P", "S(3)", "S(3)"]) in admitted


LISTED = with_lists()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", FORWARD + BACKWARD + PERMUTING + FUSED + [*LISTED])
def test_nothing_is_wrong_on_2_3_4_2x2_and_2x3_ranks_with_all_flags(name):
    op, args, options = (CALLS | LISTED)[name]
    report = moesaic.prove(op, *args, backward=options.get("backward", True))
    assert report.wrong == [], f"{report}"
    assert report.stuck == [], f"{report}"
    assert not [text for text in report.untried if text.startswith(("every example has", "no example has"))]
