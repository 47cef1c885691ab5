"""Balance losses of the override `moe` on ranks: the gradients of one process, in every backend and layout.

Losses and masks on one process are compared with those of our own layer in test_moe.py.
"""

import functools
from dataclasses import replace

import pytest

from moesaic.testing.pool import Ranks
from tests.torchtitan.case import Case, Record, merged, run
from tests.torchtitan.compare import assert_equal

BATCH = (("aux_loss_coef", 0.5), ("z_loss_coef", 0.05))
SEQUENCE = (*BATCH, ("aux_loss", "sequence"))
# Unlike the others this loss is the mean of those of parts of a batch.
OF_EACH_TOKEN = (("z_loss_coef", 0.5),)

CASES = [
    # Without tp and ep torchtitan lays out nothing in this backend.
    (2, Case("deepseek_v3", "moe", BATCH)),
    (2, Case("deepseek_v3", "moe", SEQUENCE, backend="spmd_types")),
    # All ranks of tp have the same tokens, and in the second the gradients of what they have alike are summed. There
    # torchtitan's own gpt_oss counts the last bias of its experts tp times.
    (2, Case("deepseek_v3", "moe", SEQUENCE, tp=2)),
    (2, Case("gpt_oss", "moe", BATCH, tp=2, backend="spmd_types", ac="full", more=("--debug.spmd_typechecking",))),
    (2, Case("deepseek_v3", "moe", BATCH, tp=2, ep=2, backend="full_dtensor")),
    (2, Case("deepseek_v3", "moe", SEQUENCE, tp=2, ep=2, etp=2, ac="full")),
    (2, Case("qwen3", "moe", SEQUENCE, cp=2, ep=2)),
    (2, Case("qwen3", "moe", BATCH, ep=2, etp=2, more=("--compile.enable", "--compile.backend", "aot_eager"))),
    (2, Case("qwen3", "moe", (*OF_EACH_TOKEN, ("forwards_per_step", 2)), ep=2, accumulate=2)),
    (2, Case("qwen3", "moe", (*OF_EACH_TOKEN, ("forwards_per_step", 8)), pp=2)),
    (4, Case("gpt_oss", "moe", SEQUENCE, tp=2, ep=4, etp=2)),
]


@pytest.fixture(scope="module")
def one_process():
    with Ranks(1) as one:

        @functools.cache
        def record(case: Case) -> Record:
            return merged(one(run, case))

        yield record


@pytest.mark.parametrize(("world_size", "case"), CASES, ids=str)
def test_losses_are_over_all_ranks(same_ranks, one_process, world_size, case):
    options = tuple(option for option in case.options if option[0] != "forwards_per_step")
    want = one_process(Case(case.model, "moe", options))
    assert_equal(merged(same_ranks(run, world_size, case)), want, case)
    if options == BATCH:  # they are not for show
        without = one_process(replace(Case(case.model), override="moe"))
        gate = "layers.1.moe.router.gate.weight"
        assert not want.grads[gate].allclose(without.grads[gate], rtol=0.1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (SEQUENCE, "aux_loss: for 'sequence' a layer has to know .* --parallelism.spmd_backend spmd_types"),
        ((*BATCH, ("forwards_per_step", 3)), "forwards_per_step: the first step had 1 forward passes .*=1, the steps"),
    ],
)
def test_losses_that_would_be_wrong_are_refused(same_ranks, options, match):
    with pytest.raises(AssertionError, match=match):
        same_ranks(run, 2, Case("deepseek_v3", "moe", options, steps=1))
