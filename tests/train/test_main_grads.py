"""`--main-grads`: the same training, with gradients of expert weights in fp32 buffers."""

import dataclasses

import pytest
import torch

from moesaic.parallel.mesh import resolve_layout
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError
from moesaic.train.main_grads import check_main_grads
from tests.distributed.parity import whole
from tests.train.conftest import one_step, run_of


def _two_steps(config, cache):
    """Gradient norm and loss of each step, and the weights after them."""
    with run_of(config, cache) as run:
        results = [one_step(run) for _ in range(2)]
        weights = {name: whole(p) for name, p in run.training.model.named_parameters()}
        return [(r.loss, r.grad_norm) for r in results], weights


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "ep": 2, "etp": 2}], ids=str)
def test_the_training_is_the_same(tiny, cache, ranks, layout):
    def run(config):
        return ranks(_two_steps, 4, config, cache)[0] if layout else _two_steps(config, cache)

    config = dataclasses.replace(tiny, **layout, compute="local")
    numbers, weights = run(config)
    theirs, changed = run(dataclasses.replace(config, main_grads=True, out=config.out.with_name("with")))
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(numbers), rtol=1e-5, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(changed[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (TrainConfig(ep=2), 2, "add --compute local"),
        (TrainConfig(ep=2, compute="local"), 4, "2 ranks share the same experts .* the number of processes, 4"),
        (TrainConfig(lora_rank=4, compute="local"), 1, "with --lora-rank the experts' weights have no gradient"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, world_size, message):
    config = dataclasses.replace(config, main_grads=True)
    layout = resolve_layout(world_size, ep=config.ep, etp=config.etp)
    with pytest.raises(UserError, match=message):
        check_main_grads(config, layout)
