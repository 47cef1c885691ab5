"""The rules of experts_lora are right, and admit what the plan of the experts needs."""

from typing import Any

import pytest

import moesaic
from moesaic.sharding.rule import short
from tests.sharding.proofs_of_ours import SILU, operands, ops, random


def call_of(form: str) -> tuple[Any, ...]:
    """Operands of 2 blocks or, where the last has fewer experts, of 4, with factors of all weights."""
    B, W = (4, 11) if form == "fewer" else (2, 6)
    gated, D, F = form != "plain", 6, 7
    third = (random(W, D, 2) + 1, random(W, 2, F)) if gated else (None, None)
    factors = (random(W, D, 2), random(W, 2, F) + 1, *third, random(W, F, 3), random(W, 3, D))
    return (*operands(B, W, gated=gated, biased=form == "biased"), *factors)


def text_of(record: Any) -> list[str]:
    return [" ".join(map(short, placements)) for placements in record.inputs]


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("form", ["biased", "plain", "fewer"])
def test_nothing_is_wrong(form):
    args = call_of(form)
    alone = {"axes": (2,), "make_up": False, "meshes": []}
    forward = moesaic.prove(ops.experts_lora, *args, SILU, None, **alone | {"meshes": [(2, 2)] * (form == "fewer")})
    inference = moesaic.prove(ops.experts_lora_inference, *args, SILU, None, backward=False, **alone)
    _, h1, h3 = ops.experts_lora(*args, SILU, None)
    grad = random(*args[0].shape).flip(0)
    reports = [forward, inference]
    # Without a gate h3 is zeros, which prove nothing.
    if form != "plain":
        call = (grad, *args, h1, h3, SILU, None, [True] * 8)
        reports.append(moesaic.prove(ops.experts_lora_backward, *call, backward=False, **alone))
    for report in reports:
        assert report.admitted
        assert report.wrong == []
    given = [t is not None for t in args]
    by_hidden = [*"RRRR", "S(2)", "S(2)", "S(1)", "S(1)", "S(1)", "P", "R", "S(2)", "R", "S(2)", "S(1)", "R"]
    assert [p for p, there in zip(by_hidden, given, strict=True) if there] in map(text_of, forward.admitted)
    assert ["S(0)"] * sum(given) in map(text_of, forward.admitted)
