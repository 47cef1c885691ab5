"""`--accumulate`: a batch in several passes is the batch in one: losses, gradients and weights."""

import dataclasses

import pytest
import torch

from moesaic.layers import expert_load
from moesaic.train.errors import UserError
from moesaic.train.loader import check_batch_size
from tests.distributed.parity import whole
from tests.train.conftest import one_step, run_of

STEPS = 2


def _steps(config, cache):
    """Loss and gradient norm of each step, the gradients of the first, the loads and the weights after the last."""
    with run_of(config, cache) as run:
        model, optimizer = run.training.model, run.training.optimizer
        grads = {}

        def keep(*_):
            grads.update({name: whole(p.grad) for name, p in model.named_parameters()} if not grads else {})

        optimizer.register_step_pre_hook(keep)
        results = [one_step(run) for _ in range(STEPS)]
        weights = {name: whole(p) for name, p in model.named_parameters()}
        numbers = [[r.loss, r.balance_loss, r.grad_norm] for r in results]
        return numbers, grads, expert_load(model), weights


def _assert_same(found, expected):
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-6, atol=0)
    assert all(torch.equal(load, expected[2][name]) for name, load in found[2].items())
    for some, others in ((found[1], expected[1]), (found[3], expected[3])):
        for name, t in some.items():
            assert (t - others[name]).norm() <= 1e-6 * others[name].norm(), name


# Of each sequence, so that it does not matter which of them are in one pass.
LOSSES = {"aux_loss": "sequence", "aux_loss_coef": 0.1, "z_loss_coef": 0.01, "batch_size": 8, "lr": 1e-3}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({}, {}),
        ({}, {"compute": "local", "main_grads": True}),
        ({"ep": 2}, {}),
        ({"tp": 2, "ep": 2}, {}),
        ({"tp": 2}, {}),
        ({"ep": 2}, {"compute": "local", "main_grads": True}),
        pytest.param({"pp": 2}, {"microbatches": 2}, marks=pytest.mark.slow),
    ],
    ids=["one process", "main grads", "dp2 ep2", "tp2 ep2", "tp2 edp2", "dp2 ep2 main grads", "pp2"],
)
def test_passes_of_a_batch_are_the_batch(tiny, cache, same_ranks, layout, options):
    def run(config):
        return same_ranks(_steps, 2, config, cache) if layout else [_steps(config, cache)]

    config = dataclasses.replace(tiny, **layout, **options, **LOSSES, max_grad_norm=0.0)
    expected = run(config)
    found = run(dataclasses.replace(config, accumulate=4, out=config.out.with_name("in passes")))
    for mine, theirs in zip(found, expected, strict=True):
        _assert_same(mine, theirs)


def test_ranks_and_passes_divide_a_batch():
    check_batch_size(24, 2, 3)
    with pytest.raises(UserError, match=r"--batch-size 16 .* 2 data parallel ranks .* times the 3 passes .*; 18 does"):
        check_batch_size(16, 2, 3)
