"""`--recompute`: the same steps, bit for bit."""

import dataclasses

import pytest
import torch

from tests.distributed.parity import whole
from tests.train.conftest import one_step, run_of


def _steps(config, cache):
    with run_of(config, cache) as run:
        results = [one_step(run) for _ in range(2)]
        return results, {name: whole(p) for name, p in run.training.model.named_parameters()}


@pytest.mark.parametrize("layout", [{}, {"ep": 2}], ids=["one process", "dp2 ep2"])
def test_steps_are_the_same_in_every_bit(tiny, cache, same_ranks, layout):
    def run(**options):
        config = dataclasses.replace(tiny, **layout, compute="local", out=tiny.out / str(len(runs)), **options)
        runs.append(same_ranks(_steps, 2, config, cache)[0] if layout else _steps(config, cache))
        return runs[-1]

    runs = []
    for options in ({"accumulate": 2, "main_grads": True}, {"dtype": "bf16"}):
        expected = run(**options)
        for way in ("experts", "selective", "full"):
            results, weights = run(recompute=way, **options)
            assert results == expected[0], (way, options)
            assert all(torch.equal(t, expected[1][name]) for name, t in weights.items()), (way, options)
