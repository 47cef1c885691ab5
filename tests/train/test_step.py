"""A number that is not finite stops every rank before a weight has changed, and says where it began."""

import dataclasses
import os
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moesaic.train.errors import TrainingError
from moesaic.train.run import set_up
from moesaic.train.runtime import started
from tests.train.conftest import one_step


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _poison_weight(model, name):
    with torch.no_grad():
        _local(model.get_parameter(name)).view(-1)[0] = float("nan")


def _poison_gradient(model, name):
    def spoil(parameter):
        _local(parameter.grad).view(-1)[0] = float("inf")

    model.get_parameter(name).register_post_accumulate_grad_hook(spoil)


def _enlarge_gradient(model, name):
    def spoil(parameter):
        _local(parameter.grad).fill_(1e30)

    model.get_parameter(name).register_post_accumulate_grad_hook(spoil)


def _poison_loss(model, name):
    # Beyond all layers: the loss itself is infinite.
    def far(module, args, output):
        output.logits = output.logits * 1e38 * 10

    model.register_forward_hook(far)


def _step_with_poison(config, cache, poison, name, victim):
    """Two good steps, then one with the poison on rank `victim`: the error, and which tensors changed."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with started("cpu") as runtime:
        run = set_up(config, runtime, lambda text: None)
        training, model = run.training, run.training.model
        one_step(run)
        one_step(run)
        if runtime.rank == victim:
            poison(model, name)
        before = {key: _local(value.detach()).clone() for key, value in model.named_parameters()}
        moments = {key: _local(training.optimizer.state[p]["exp_avg"]).clone() for key, p in model.named_parameters()}
        with pytest.raises(TrainingError) as error:
            one_step(run)
        changed = [
            key
            for key, value in model.named_parameters()
            if not torch.equal(_local(value.detach()).nan_to_num(7.0), before[key].nan_to_num(7.0))
            or not torch.equal(_local(training.optimizer.state[value]["exp_avg"]), moments[key])
        ]
        # The ranks are still in step with one another.
        if dist.is_initialized():
            dist.barrier()
        return str(error.value), changed, training.step


LAYOUT = {"tp": 2, "ep": 2, "etp": 2}


@pytest.mark.parametrize(
    ("poison", "name", "victim", "message"),
    [
        (_poison_weight, "model.layers.1.self_attn.q_proj.weight", 1, "nan; .* is that of model.layers.1, on"),
        (_poison_weight, "model.layers.0.mlp.experts.w2", 3, "nan; .* is that of model.layers.0, on"),
        pytest.param(_poison_weight, "lm_head.weight", 0, "nan; .* is that of lm_head, on", marks=pytest.mark.slow),
        (_poison_gradient, "model.layers.1.mlp.experts.w1", 2, "the gradient of model.layers.1.mlp.experts.w1 is not"),
        pytest.param(
            _poison_gradient, "model.norm.weight", 1, "the gradient of model.norm.weight is not", marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_all_ranks_stop_before_the_update(tiny, cache, ranks, poison, name, victim, message):
    config = dataclasses.replace(tiny, **LAYOUT)
    for text, changed, step in ranks(_step_with_poison, 4, config, cache, poison, name, victim):
        assert changed == []
        assert step == 2
        assert re.search(f"^step 3: .*non-finite.*{message}", text), text


@pytest.mark.parametrize(
    ("poison", "name", "message"),
    [
        (_poison_weight, "model.embed_tokens.weight", "is that of"),
        (_poison_loss, "", "every layer's output is finite"),
        (_poison_gradient, "lm_head.weight", "the gradient of lm_head.weight is not"),
        (_enlarge_gradient, "lm_head.weight", "all gradients are finite, but their norm is more than fp32 can hold"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:20],
)
def test_one_process_stops_as_well(tiny, cache, poison, name, message):
    if name == "model.embed_tokens.weight":

        def poison(model, name):
            with torch.no_grad():
                model.get_parameter(name).fill_(float("nan"))

    text, changed, step = _step_with_poison(tiny, cache, poison, name, 0)
    assert (changed, step) == ([], 2)
    assert message in text


def _step_without_room(config, cache):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with started("cpu") as runtime:
        run = set_up(config, runtime, lambda text: None)
        before = {key: _local(value.detach()).clone() for key, value in run.training.model.named_parameters()}
        with pytest.raises(TrainingError) as error:
            one_step(run)
        after = {key: _local(value.detach()) for key, value in run.training.model.named_parameters()}
        return str(error.value), all(torch.equal(after[key], t) for key, t in before.items())


def test_a_step_that_has_no_room_changes_nothing_and_says_what_to_give(tiny, cache, ranks):
    config = dataclasses.replace(tiny, tp=2, ep=2, capacity=2)
    for text, is_unchanged in ranks(_step_without_room, 2, config, cache):
        said = r"step 1: (\d+) copies of tokens .* --capacity has room for 2; give at least \1. No weight .* changed."
        assert re.fullmatch(said, text)
        assert is_unchanged
