"""What computes a run is kept with it, and taken up again when it goes on."""

import dataclasses
import json
import shutil

import pytest
import torch

from moesaic.checkpoint import checkpoints, read_manifest
from moesaic.ops import fastest, library, native
from moesaic.ops.choices import CASES, from_json, to_json
from moesaic.train import implementations
from moesaic.train.errors import UserError
from moesaic.train.run import set_up
from moesaic.train.runtime import started
from moesaic.train.training import save
from tests.ops.cpu_isa import needs_kernels
from tests.train.conftest import one_step

pytestmark = needs_kernels
ALL_TORCH = dict.fromkeys(CASES, "torch")


@pytest.fixture(autouse=True)
def chooses_anew():
    yield
    fastest.use(None)


def test_an_install_without_kernels_says_so(monkeypatch, tmp_path):
    said = []
    implementations.tell_of_missing_kernels(torch.device("cpu"), said.append)
    assert said == []
    monkeypatch.setattr(library, "PATH", tmp_path / "libmoesaic_cpu.so")
    implementations.tell_of_missing_kernels(torch.device("meta"), said.append)
    assert said == []
    implementations.tell_of_missing_kernels(torch.device("cpu"), said.append)
    assert said == [
        "without the CPU kernels: they were not built: install a C++20 compiler with OpenMP, then moesaic again. "
        "Until then torch computes the experts"
    ]


def _run(config, steps, own=None):
    """Some steps of a run on a machine with a choice of its own: the weights, what was said, what computed them."""
    fastest.use(own)
    said = []
    with started("cpu") as runtime:
        run = set_up(config, runtime, said.append)
        for _ in range(steps):
            one_step(run)
        save(run.training, run.config, run.folder)
        weights = torch.cat([p.detach().flatten() for p in run.training.model.parameters()])
        choices = fastest.in_force()
        run.close()
    return weights, said, choices


def test_a_run_goes_on_with_what_it_began_with(tiny, tmp_path):
    whole, *_ = _run(dataclasses.replace(tiny, out=tmp_path / "whole"), 4, ALL_TORCH)
    _run(tiny, 2, ALL_TORCH)
    (file,) = checkpoints(tiny.out / "checkpoints")
    kept = [read_manifest(file).info, json.loads((tiny.out / "config.json").read_text())]
    assert [from_json(values["implementations"]["choices"]) for values in kept] == [ALL_TORCH] * 2

    # The machine's own choice is the kernels, here.
    kernels = dict.fromkeys(CASES, "cpu")
    again = dataclasses.replace(tiny, resume=True, choose_again=True)
    other, _, choices = _run(dataclasses.replace(again, out=_copy(tiny.out, tmp_path)), 2, kernels)
    assert choices == kernels
    assert not torch.equal(other, whole)

    resumed, said, choices = _run(dataclasses.replace(tiny, resume=True), 2, kernels)
    assert choices == ALL_TORCH
    assert torch.equal(resumed, whole)
    assert not any("last digits" in text for text in said)
    assert fastest._used is None


def _copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("lock"))


def _kept(kernels="avx512_bf16", name="cpu"):
    return {"kernels": kernels, "choices": to_json(dict.fromkeys(CASES, name))}


def test_a_machine_without_the_kernels_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "kernels", lambda: "they were not built")
    cpu, said = torch.device("cpu"), []
    told = f"the run in {tmp_path} computes .* none here: they were not built. Or go on .* --choose-again"
    with pytest.raises(UserError, match=told):
        implementations.take_up(_kept(), cpu, tmp_path, said.append)
    assert fastest._used is None
    # Nothing of this asks for the kernels.
    for saved, device in ((_kept(name="torch"), cpu), (None, cpu), (_kept(), torch.device("meta"))):
        implementations.take_up(saved, device, tmp_path, said.append)
    assert implementations.settle(torch.device("meta")) is None
    assert said == []


def test_other_kernels_are_told(tmp_path):
    said = []
    implementations.take_up(_kept("avx1024"), torch.device("cpu"), tmp_path, said.append)
    assert "this run was computed by those of avx1024: it goes on, and its last digits may differ" in said[0]
    implementations.take_up(_kept("avx1024", "torch"), torch.device("cpu"), tmp_path, said.append)
    assert len(said) == 1
