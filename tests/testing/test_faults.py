"""Planted faults of the field are named, each by its kind, axis and place, on three kinds of parallel models."""

import functools

import pytest

from moesaic.testing import Check, Pools, check_gradients
from tests.testing import bare, qwen

# What is wrong, on which layout; the kind and axes of the first finding, and a piece of what it says.
FAULTS = {
    "loss times dp": ({"dp": 2}, "factor", {"dp"}, "every parameter"),
    "router": ({"tp": 2, "ep": 2}, "own part", {"tp", "ep"}, "moe.router.weight"),
    "experts averaged": ({"dp": 2, "ep": 2, "tp": 2}, "factor", {"dp", "edp"}, "moe.experts.w"),
    "partial": ({"tp": 2}, "layer own part", {"tp"}, "output of moe.shared"),
    "partial in backward": ({"tp": 2}, "own part", {"tp"}, "input of moe.shared"),
    "balance": ({"tp": 2}, "term", {"tp"}, "'balance' of the loss counts 2 times"),
    "shared counted": ({"tp": 2, "ep": 2}, "child", {"tp", "ep"}, "has moe.shared in it 2 times"),
    "bias on every rank": ({"tp": 2}, "bias", {"tp"}, "has moe.shared.bias in it 2 times"),
    "wrong group": ({"dp": 2, "ep": 2, "tp": 2}, "wrong group", {"tp", "ep"}, "moe.experts.w"),
    "initialisation": ({"dp": 2}, "initial", {"dp"}, "weight head.weight"),
    "dropout": ({"tp": 2}, "dropout", {"tp"}, "mask"),
    "clip": ({"ep": 2, "tp": 2}, "norm", set(), "each rank clips"),
}
# The same of Qwen3-MoE.
OF_QWEN = {
    "loss times dp": ({"dp": 2}, "factor", {"dp"}, "every parameter"),
    "router": ({"tp": 2}, "own part", {"tp"}, "layers.0.mlp.gate.weight"),
    "experts averaged": ({"dp": 2, "tp": 2}, "factor", {"dp"}, "mlp.experts."),
    "partial": ({"tp": 2}, "layer own part", {"tp"}, "output of model.layers.0.mlp.experts"),
    "partial in backward": ({"tp": 2}, "own part", {"tp"}, "layers.1.post_attention_layernorm.weight"),
    "balance": ({"tp": 2}, "term", {"tp"}, "'balance' of the loss counts 2 times"),
    "shared counted": ({"tp": 2}, "child", {"tp"}, "has model.layers.1.mlp in it 2 times"),
    "bias on every rank": ({"tp": 2}, "bias", {"tp"}, "has model.layers.1.self_attn.o_proj.bias in it 2 times"),
    "wrong group": ({"dp": 2, "tp": 2}, "wrong group", {"tp"}, "mlp.experts."),
    "initialisation": ({"dp": 2}, "initial", {"dp"}, "weight lm_head.weight"),
    "dropout": ({"tp": 2}, "dropout", {"tp"}, "mask"),
    "clip": ({"tp": 2}, "norm", set(), "each rank clips"),
}
# The others take longer, and find the same code at work.
SHORT = {"partial in backward", "bias on every rank", "experts averaged"}


@pytest.fixture(scope="module")
def pools():
    pools = Pools()
    yield pools
    pools.stop()


def assert_named(pools: Pools, check: Check, kind: str, axes: set[str], piece: str) -> None:
    report = check_gradients(check, pools)
    assert report.ran, report
    first = report.findings[0]
    assert first.kind == kind, report
    assert set(first.axes) <= axes, report
    assert bool(first.axes) == bool(axes), report
    assert piece in first.said, report


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(pools, fault):
    layout, *expected = FAULTS[fault]
    build = functools.partial(bare.build, 0.5) if fault == "dropout" else bare.build
    assert_named(pools, bare.check(fault, build=build, layouts=[layout]), *expected)


@pytest.mark.parametrize("fault", [f if f in SHORT else pytest.param(f, marks=pytest.mark.long) for f in OF_QWEN])
def test_a_planted_fault_in_a_transformers_model_is_named(pools, fault):
    layout, *expected = OF_QWEN[fault]
    assert_named(pools, qwen.check(fault, layout), *expected)


# FSDP2 reduces over dp by itself, and so in no wrong group.
@pytest.mark.parametrize(
    "fault",
    [
        f if f == "experts averaged" else pytest.param(f, marks=pytest.mark.long)
        for f in OF_QWEN
        if f not in ("wrong group", "clip")
    ],
)
def test_a_planted_fault_beside_fsdp2_is_named(pools, fault):
    layout, *expected = OF_QWEN[fault]
    # Of the other axes another layout says that they are right.
    check = qwen.check(fault, {"dp": 2, **layout}, fsdp=True)
    report = check_gradients(check, pools)
    assert report.ran, report
    kind, axes, piece = expected
    first = report.findings[0]
    assert first.kind == kind, report
    # Shards of different models, put together, are the same on all ranks.
    assert axes <= set(first.axes) or fault == "initialisation", report
    assert piece in first.said, report


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_right_layout_of_a_transformers_model_is_equal(pools, fsdp):
    report = check_gradients(qwen.check("", {"dp": 2, "tp": 2}, fsdp), pools)
    assert report.ok, report
