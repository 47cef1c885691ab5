"""Recomputation, the compiler, backends, schedules, accumulated gradients, bf16; and what a CPU cannot run."""

import pytest

from moesaic.testing.pool import RankError
from tests.torchtitan.case import MODELS, Case, merged, run
from tests.torchtitan.compare import assert_equal, errors

COMPILED = ("--compile.enable", "--compile.components", "model", "--compile.backend", "aot_eager")
INTERLEAVED = ("--parallelism.pipeline-parallel-schedule", "Interleaved1F1B")
ZERO_BUBBLE = ("--parallelism.pipeline-parallel-schedule", "InterleavedZeroBubble")

WAYS: dict[str, list[tuple[int, Case]]] = {
    "recomputation": [
        (ranks, Case(model, override, ac=ac, ep=ranks, etp=etp))
        for ac in ("selective", "full")
        for model in MODELS
        for ranks, override, etp in ((1, "experts", 1), (1, "routed_experts", 1), (2, "routed_experts", 2))
    ],
    "compiled": [
        (ranks, Case("qwen3", override, ep=ranks, etp=etp, more=COMPILED))
        for ranks, override, etp in (
            (1, "experts", 1),
            (1, "routed_experts", 1),
            (2, "experts", 1),
            (2, "routed_experts", 1),
            (2, "routed_experts", 2),
        )
    ],
    "backends": [
        *((2, Case("qwen3", "experts", backend="full_dtensor", **degrees)) for degrees in ({"ep": 2}, {"tp": 2})),
        *((2, Case("qwen3", "experts", backend="spmd_types", **degrees)) for degrees in ({}, {"tp": 2}, {"cp": 2})),
        # With equal sizes gloo takes torchtitan's all-to-all of lists.
        (2, Case("qwen3", "experts", backend="spmd_types", tp=2, ep=2, forced=True)),
        *(
            (2, Case("qwen3", "routed_experts", backend=backend, **degrees))
            for backend in ("full_dtensor", "spmd_types")
            for degrees in ({}, {"ep": 2}, {"tp": 2}, {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2})
        ),
    ],
    "schedules": [(2, Case("qwen3", override, pp=2, more=INTERLEAVED)) for override in ("experts", "routed_experts")],
    "accumulated": [
        (2, Case(model, "routed_experts", ep=2, etp=2, accumulate=2)) for model in ("qwen3", "deepseek_v3")
    ],
}


@pytest.mark.parametrize(
    ("world_size", "case"), [pytest.param(*way, id=f"{name}, {way}") for name, ways in WAYS.items() for way in ways]
)
def test_way_equals_stock(same_ranks, alone, world_size, case):
    assert_equal(merged(same_ranks(run, world_size, case)), alone(case), case)


def test_zero_bubbles_are_as_in_stock(same_ranks):
    """In this schedule torchtitan's last norm gets no gradient, so what counts is stock with the same layout."""
    case = Case("qwen3", "routed_experts", pp=2, more=ZERO_BUBBLE)
    got, want = (merged(same_ranks(run, 2, c)) for c in (case, case.stock()))
    assert_equal(got, want, case)


# A rounding here goes another way than a rounding there.
MARGIN = 1.5


@pytest.mark.parametrize("override", ["experts", "routed_experts"])
@pytest.mark.parametrize("model", MODELS)
def test_bf16_is_as_near_to_fp32_as_stock_is(same_ranks, alone, model, override):
    case = Case(model, override, dtype="bfloat16", forced=True, steps=1)
    truth = alone(Case(model, forced=True, steps=1))
    ours, stock = (errors(merged(same_ranks(run, 1, c)).grads, truth.grads) for c in (case, case.stock()))
    worse = {name: (error, stock[name]) for name, error in ours.items() if error > MARGIN * stock[name]}
    assert worse == {}


# The stock run comes first: what fails there has nothing to do with an override.
NOT_ON_CPU = {
    "gloo's all-to-all of lists takes equal sizes only": (
        "ProcessGroupGloo::alltoall: invalid tensor size",
        [Case("qwen3", override, ep=2, backend="spmd_types") for override in ("", "experts")],
    ),
    "varlen attention is of FlashAttention, and that of CUDA": (
        "varlen",
        [Case("gpt_oss_varlen", override) for override in ("", "experts", "routed_experts")],
    ),
    "DistMuon asks for CUDA": (
        "DistMuon requires one CUDA device per process",
        [Case("deepseek_v3_muon", override, ep=2) for override in ("", "experts", "routed_experts")],
    ),
    "the forced routing of a DTensor is no DTensor": (
        "aten.gather.default got mixed torch.Tensor and DTensor",
        [Case("qwen3", override, tp=2, forced=True) for override in ("", "experts", "routed_experts")],
    ),
}


@pytest.mark.parametrize("why", NOT_ON_CPU)
def test_what_fails_fails_in_stock_too(ranks, why):
    message, tried = NOT_ON_CPU[why]
    for case in tried:
        with pytest.raises(RankError) as failed:
            ranks(run, 2, case)
        assert message in str(failed.value), case
