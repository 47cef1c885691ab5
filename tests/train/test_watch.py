"""What is measured of a step: entropy of routers, bytes, arithmetic, pictures of the load, traces."""

import gzip
import json

import numpy as np
import pytest
import torch
from benchmarks.wire_bytes import CountSent
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moesaic
from moesaic.parallel.collectives import sent_bytes
from moesaic.train.config import TrainConfig, check
from moesaic.train.errors import UserError
from moesaic.train.flops import flops_per_token, known_peak
from moesaic.train.load_picture import load_picture
from moesaic.train.profile import StepProfiler
from moesaic.train.watch import watching
from tests.train.conftest import MODEL

CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=16, num_experts=4, top_k=2, score="sigmoid")


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_entropy_of_scores_is_that_of_all_tokens_but_padding(recomputed):
    torch.manual_seed(0)
    moe = moesaic.MoE(CONFIG)
    nn.init.normal_(moe.router.weight)
    passes = torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])
    with watching(moe, True) as watched:
        for x in passes:
            y = checkpoint(moe, x, mask, use_reentrant=False) if recomputed else moe(x, mask)
            y.square().sum().backward()
    shares = (passes[:, mask].flatten(0, 1) @ moe.router.weight.mT).sigmoid()
    shares = shares / shares.sum(1, keepdim=True)
    expected = -(shares * shares.log()).sum()
    torch.testing.assert_close(watched.entropy["router"], torch.stack([expected.detach(), torch.tensor(8.0)]))
    moe(passes[0])
    assert watched.entropy["router"][1] == 8
    with watching(moe, False) as nothing:
        assert nothing is None


def check_sent() -> None:
    torch.manual_seed(0)
    # Without FSDP, and without a gradient that is summed: the counter does not know these.
    moe = moesaic.MoE(CONFIG)
    moe.router.requires_grad_(False)
    moesaic.parallelize(moe, moesaic.build_meshes(tp=4, ep=2, etp=2, device_type="cpu"))
    before = sent_bytes()
    with CountSent(8) as counted:
        moe(torch.randn(6, 8, requires_grad=True)).square().sum().backward()
    # Counts of rows go another way.
    rows = counted.to(range(4)).rows
    assert 0 < rows <= sent_bytes() - before <= sum(counted.to(range(4)))


@pytest.mark.slow
def test_bytes_sent_are_those_on_the_wire(ranks):
    ranks(check_sent, 4)


def test_arithmetic_is_that_of_the_products():
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    x = torch.randn(7, 6, requires_grad=True)
    for trainable in (True, False):
        model[0].requires_grad_(trainable)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        assert flops_per_token(model, seq_len=3) * 7 == counter.get_total_flops()
    # Of experts those that a token goes to, and the router.
    assert flops_per_token(moesaic.MoE(CONFIG), 3) == 6 * (3 * 8 * 16 * 2 + 8 * 4)
    assert known_peak(torch.device("cpu"), "bf16") is None


def test_arithmetic_of_a_decoder_has_attention_and_head_and_no_embedding():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moesaic.integrations.transformers import swap_moe

    model = swap_moe(Qwen3MoeForCausalLM(Qwen3MoeConfig(**{k: v for k, v in MODEL.items() if k != "model_type"})))
    projections = 32 * (4 * 8) * 2 + 32 * (2 * 8) * 2
    layer = projections + 3 * 32 * 24 * 2 + 32 * 4
    assert flops_per_token(model, 10) == 6 * (2 * layer + 32 * 320) + 12 * 2 * 4 * 8 * 10


def test_the_picture_shows_dead_and_busy_experts():
    picture = load_picture({"a": [0, 10, 10, 60], "b": [20, 20, 20, 20]})
    assert picture.dtype == np.uint8
    dead, less, _, busy = (tuple(picture[25, 30 + 24 * expert + 5]) for expert in range(4))
    assert dead == (0, 0, 0)
    assert less[2] > less[0]  # blue
    assert busy[0] > busy[2]  # orange
    assert tuple(picture[25 + 24, 30 + 5]) == (255, 255, 255)


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path):
    notes = []
    profiler = StepProfiler(range(3, 5), tmp_path / "profile", torch.device("cpu"), notes.append)
    for step in (4, 5):  # resumed in the middle
        profiler.before(step)
        torch.ones(3).square()
        profiler.after(step)
    profiler.close(5)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-4-4-rank-0.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert "aten::square" in {event.get("name") for event in events}
    assert notes == [f"trace of steps 4 to 4: {path}"]
    (tmp_path / "file").touch()
    profiler = StepProfiler(range(1, 9), tmp_path / "file", torch.device("cpu"), notes.append)
    profiler.before(1)
    profiler.close(1)
    assert notes[-1].startswith("warning: cannot write")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile_steps": "a"}, "--profile-steps a: give a step, or the first and the last"),
        ({"profile_steps": "5:4"}, "--profile-steps 5:4: give a step"),
        ({"profile_steps": "0"}, "--profile-steps 0: give a step"),
        ({"peak_tflops": 0.0}, "--peak-tflops must be a number above 0, not 0.0"),
        ({"muon_lr": 0.02}, "--muon-lr is for Muon; add --optimizer muon"),
        ({"optimizer": "muon", "muon_steps": 0}, "--muon-steps must be from 1 to 99, not 0"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "--muon-momentum must be at least 0 and below 1"),
        ({"optimizer": "muon", "muon_lr": 0.0}, "--muon-lr must be more than 0"),
    ],
    ids=str,
)
def test_values_no_run_could_work_with(change, message):
    with pytest.raises(UserError, match=message):
        check(TrainConfig(**change))
