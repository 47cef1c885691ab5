"""`--compile`: the training is the same, and nothing is compiled anew when other tokens come."""

import dataclasses

import pytest
import torch

from moesaic.train.compiled import compile_layers
from tests.train.conftest import one_step, run_of

# In the second the sizes are others, and become symbols.
WARM, STEPS = 4, 50


def _steps(config, cache, backend):
    with run_of(config, cache) as run:
        if backend is not None:
            compile_layers(run.training.model, backend=backend)
        results = []
        for step in range(STEPS):
            with torch._dynamo.config.patch(error_on_recompile=step >= WARM):
                results.append(one_step(run))
        return [[r.loss, r.balance_loss, r.grad_norm] for r in results]


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"ep": 2}, {"tp": 2, "ep": 2}], ids=["dp2 ep2", "tp2 ep2"])
def test_other_tokens_compile_nothing_anew(tiny, cache, same_ranks, layout):
    config = dataclasses.replace(tiny, **layout, steps=STEPS)
    expected = same_ranks(_steps, 2, config, cache, None)[0]
    compiled = dataclasses.replace(config, out=config.out.with_name("compiled"))
    found = same_ranks(_steps, 2, compiled, cache, "aot_eager")[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
