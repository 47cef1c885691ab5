"""A run over the stages of a pipeline is the run of one process, and settings that it cannot have are told by name."""

import dataclasses
import json
import os
import re

import pytest
import torch

from moesaic.parallel.mesh import resolve_layout
from moesaic.train import loop
from moesaic.train.compiled import compile_layers
from moesaic.train.config import from_json, to_json
from moesaic.train.errors import TrainingError, UserError
from moesaic.train.metrics import read_jsonl
from moesaic.train.pipelining import check_pipeline
from moesaic.train.watch import metrics_of, watching
from tests.train.conftest import MODEL, one_step, run_of

REFUSED = {
    "--microbatches is for a pipeline: add --pp, or leave it out; --accumulate cuts a batch": {"microbatches": 4},
    "--stages-per-rank is for a pipeline: add --pp, or leave it out$": {"stages_per_rank": 2},
    "--aux-loss with --pp 2: pooled is one loss over all layers": {"pp": 2, "aux_loss": "pooled"},
    "--main-grads with --pp 2: --pp-schedule zbv makes": {"pp": 2, "main_grads": True, "pp_schedule": "zbv"},
    "--microbatches: '1f1b' needs at least as many as stages, 2, got 1": {"pp": 2, "microbatches": 1},
    "--pp-schedule: 'zbv' makes gradients of weights apart": {"pp": 2, "pp_schedule": "zbv"},
    "--stages-per-rank: '1f1b' has 1 on each rank, got 2": {"pp": 2, "stages_per_rank": 2},
    "--layers-per-stage: expected 2 numbers": {"pp": 2, "layers_per_stage": (1, 1)},
    "--pp: 4 stages are more than the 3 layers": {"pp": 4},
}


@pytest.mark.parametrize("text", REFUSED)
def test_settings_that_a_pipeline_cannot_have_are_refused_by_flag(tiny, text):
    config = dataclasses.replace(tiny, **REFUSED[text])
    with pytest.raises(UserError, match=text):
        check_pipeline(config, resolve_layout(8, pp=config.pp), num_layers=3)


def test_settings_come_back_from_json(tiny):
    config = dataclasses.replace(tiny, pp=2, layers_per_stage=(1, 3), stages_per_rank=1)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def _train(config, cache):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    loop.train(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"pp": 2, "microbatches": 2}),
        pytest.param(
            *(4, {"pp": 2, "ep": 2, "pp_schedule": "interleaved", "microbatches": 2, "dtype": "bf16"}),
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_the_whole_program(tiny, cache, tmp_path, ranks, world_size, changes):
    """Losses, norms, loads and scores are those of one process; so is the export, which the program itself compares."""
    file = tmp_path / "tied.json"
    file.write_text(json.dumps({**MODEL, "num_hidden_layers": 4, "tie_word_embeddings": True}))
    common = {"model": str(file), "aux_loss": "sequence", "eval_every": 3, "dtype": changes.get("dtype", "fp32")}
    whole = dataclasses.replace(tiny, out=tmp_path / "whole", **common)
    _train(whole, cache)
    staged = dataclasses.replace(tiny, out=tmp_path / "staged", **(common | changes))
    ranks(_train, world_size, staged, cache)
    tolerance = 1e-5 if whole.dtype == "fp32" else 3e-2
    rows = [read_jsonl(config.out / "metrics.jsonl") for config in (staged, whole)]
    for mine, theirs in zip(*rows, strict=True):
        assert mine.keys() == theirs.keys()
        for name in {"loss", "balance_loss", "bits_per_byte"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance), name
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=100 * tolerance)
        assert mine["expert_load"].keys() == theirs["expert_load"].keys()
        if whole.dtype == "fp32":
            assert mine["expert_load"] == theirs["expert_load"]
    one, two = (json.loads((config.out / "config.json").read_text()) for config in (staged, whole))
    assert one["parameters"] == two["parameters"]


def _spoil(parameter):
    parameter.grad.view(-1)[0] = float("inf")


def _step_with_poison(config, cache, name, in_gradient):
    """A good step, then one with a number on one stage that is not finite: the same error on all ranks."""
    with run_of(config, cache) as run:
        one_step(run)
        for own, parameter in run.training.model.named_parameters():
            if own.endswith(name) and in_gradient:
                parameter.register_post_accumulate_grad_hook(_spoil)
            elif own.endswith(name):
                with torch.no_grad():
                    parameter.view(-1)[0] = float("nan")
        with pytest.raises(TrainingError) as error:
            one_step(run)
        return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_gradient", "told"),
    [
        (False, "output .* is that of model.layers.1, on 1 of 2"),
        (True, "gradient of model.layers.1.post_attention_layernorm.weight is not"),
    ],
)
def test_a_number_that_is_not_finite_stops_all_stages(tiny, cache, ranks, in_gradient, told):
    config = dataclasses.replace(tiny, pp=2, microbatches=2)
    name = "layers.1.post_attention_layernorm.weight"
    messages = ranks(_step_with_poison, 2, config, cache, name, in_gradient)
    assert len(set(messages)) == 1
    assert re.search(told, messages[0]), messages[0]


def _numbers(config, cache, backend):
    """Of three steps, by a stage's own settings."""
    with run_of(config, cache) as run:
        if backend is not None:
            compile_layers(run.training.model, backend=backend)
        results = []
        for _ in range(3):
            with watching(run.training.model, wanted=True) as watched:
                results.append(one_step(run))
        compiled = dataclasses.replace(config, compile=backend is not None)
        assert watched is not None
        row = metrics_of(run.training, compiled, run.meshes, run.runtime.device, results[-1], watched, 1.0)
        assert ("balance_loss" in row) == (backend is None)
        return [[r.loss, r.balance_loss, r.grad_norm] for r in results]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "backend"),
    [({"recompute": "selective", "capacity": 200}, None), pytest.param({}, "eager", marks=pytest.mark.long)],
    ids=["recomputed, with a capacity", "compiled"],
)
def test_other_settings_change_no_number(tiny, cache, tmp_path, ranks, options, backend):
    plain = dataclasses.replace(tiny, pp=2, ep=2, microbatches=2)
    expected = ranks(_numbers, 4, plain, cache, None)[0]
    found = ranks(_numbers, 4, dataclasses.replace(plain, out=tmp_path / "other", **options), cache, backend)
    # Compiled layers attach their balance losses, and do not tell the values.
    told = [0, 1, 2] if backend is None else [0, 2]
    for numbers in found:
        torch.testing.assert_close(torch.tensor(numbers)[:, told], torch.tensor(expected)[:, told], rtol=1e-5, atol=0)


def _short_of_room(config, cache):
    with run_of(config, cache) as run:
        with pytest.raises(TrainingError) as error:
            one_step(run)
        return str(error.value)


@pytest.mark.slow
def test_a_capacity_that_one_stage_passes_stops_all(tiny, cache, ranks):
    messages = ranks(_short_of_room, 4, dataclasses.replace(tiny, pp=2, ep=2, microbatches=2, capacity=1), cache)
    assert len(set(messages)) == 1
    assert re.search(r"step 1: (\d+) copies .* --capacity has room for 1; give at least \1", messages[0])
