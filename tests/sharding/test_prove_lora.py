"""The rules of experts_lora are right, and admit what the plan of the experts needs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import moesaic
from moesaic.sharding.rule import short
from tests.sharding.proofs_of_ours import SILU, operands, ops, random

# Forms with a dropout.
DROPPED = {"fewer": 0.3, "dropped": 0.5}


def call_of(form: str) -> tuple[Any, ...]:
    """Operands of 2 blocks or, where the last has fewer experts, of 4, with factors of all weights."""
    B, W = (4, 11) if form == "fewer" else (2, 6)
    gated, D, F = form != "plain", 6, 7
    third = (random(W, D, 2) + 1, random(W, 2, F)) if gated else (None, None)
    factors = (random(W, D, 2), random(W, 2, F) + 1, *third, random(W, F, 3), random(W, 3, D))
    base = operands(B, W, gated=gated, biased=form == "biased")
    indices = (torch.arange(base[1].numel()).view(base[1].shape), torch.arange(F)) if form in DROPPED else (None, None)
    return (*base, *factors, *indices)


def text_of(record: Any) -> list[str]:
    return [" ".join(map(short, placements)) for placements in record.inputs]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_nothing_is_wrong():
    check("fewer", axes=(2, 3))


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
def test_nothing_is_wrong_on_more_ranks():
    check("fewer", axes=(4,), meshes=[(2, 2)])


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("form", ["biased", "plain", "dropped"])
def test_nothing_is_wrong_in_other_forms(form):
    check(form, axes=(2, 3))


def check(form: str, *, axes: tuple[int, ...], meshes: Sequence[tuple[int, int]] = ()) -> None:
    args, p = call_of(form), DROPPED.get(form, 0.0)
    alone = {"axes": (2,), "make_up": False, "meshes": []}
    forward = moesaic.prove(ops.experts_lora, *args, SILU, None, p, make_up=False, axes=axes, meshes=meshes)
    inference = moesaic.prove(ops.experts_lora_inference, *args, SILU, None, p, backward=False, **alone)
    _, h1, h3 = ops.experts_lora(*args, SILU, None, p)
    grad = random(*args[0].shape).flip(0)
    reports = [forward, inference]
    # Without a gate h3 is zeros, which prove nothing.
    if form != "plain":
        call = (grad, *args, h1, h3, SILU, None, p, [True] * 8)
        reports.append(moesaic.prove(ops.experts_lora_backward, *call, backward=False, **alone))
    for report in reports:
        assert report.admitted
        assert report.wrong == []
    given = [t is not None for t in args]
    weights = [f"S({dim})" for dim in (2, 2, 1, 1, 1)]
    by_hidden = [*"RRRR", *weights, *"PR", "S(2)", "R", "S(2)", "S(1)", *"RR", "S(0)"]
    assert [p for p, there in zip(by_hidden, given, strict=True) if there] in map(text_of, forward.admitted)
    assert ["S(0)"] * sum(given[:-1]) + ["R"] * given[-1] in map(text_of, forward.admitted)
