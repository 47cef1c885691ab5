"""The tuner: what a launch's key tells apart, what is remembered, what fails is skipped and named."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from moesaic.ops import accumulate_weight_grad, experts_mlp, grouped_mm
from moesaic.ops.triton import configs, tuner
from tests.ops import oracle
from tests.ops.experts_oracle import experts, run
from tests.ops.strategies import layout, problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOESAIC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "_ROUNDS", 1)
    monkeypatch.setattr(tuner, "_asked", None)
    monkeypatch.setattr(tuner, "_known", {})
    return tmp_path


@pytest.fixture
def keys(monkeypatch) -> list[str]:
    """Of the launches that follow."""
    found: list[str] = []
    monkeypatch.setattr(configs, "choose", None)
    for kernels in ("matmul", "up_projection", "down_gradient", "weight_grad"):
        module = __import__(f"moesaic.ops.triton.{kernels}", fromlist=["choose"])
        monkeypatch.setattr(
            module, "choose", lambda launch, run: (found.append(launch.key), configs.default_of(launch))[1]
        )
    return found


def one_product() -> torch.Tensor:
    p = problem(layout("flat", [[20, 0, 7]], slack=1), 30, 33, torch.bfloat16)
    return grouped_mm(p.x, p.w, p.group_sizes, impl="triton")


def test_it_finds_right_results_and_remembers(monkeypatch, folder):
    monkeypatch.setenv("MOESAIC_TRITON_AUTOTUNE", "1")
    p = problem(layout("flat", [[20, 0, 7]], slack=1), 30, 33, torch.bfloat16)
    oracle.check(p, oracle.run("triton", p))
    [file] = folder.iterdir()
    assert file == tuner.cache_file(CPU)
    tuner._known.clear()
    monkeypatch.setattr(tuner, "_time", lambda *_: pytest.fail("timed again"))
    oracle.check(p, oracle.run("triton", p))
    monkeypatch.setenv("MOESAIC_TRITON_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="MOESAIC_TRITON_AUTOTUNE: got 'yes'"):
        oracle.run("triton", p)


def test_read_takes_what_is_known_and_times_nothing(monkeypatch):
    monkeypatch.setenv("MOESAIC_TRITON_AUTOTUNE", "read")
    monkeypatch.setattr(tuner, "_time", lambda *_: pytest.fail("timed"))
    used = []
    launch = configs.Config.grid
    monkeypatch.setattr(configs.Config, "grid", lambda self, *args: (used.append(self), launch(self, *args))[1])
    one_product()
    assert used == [configs._INTERPRETED]
    other = replace(configs._INTERPRETED, BN=16)
    monkeypatch.setattr(tuner, "table", lambda device: AnyKey({"config": {"BN": 16}}))
    one_product()
    assert used[1:] == [other]


class AnyKey(dict):
    """Has one value for every key."""

    def __init__(self, value):
        self.value = value

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return self.value


def test_what_was_tuned_is_of_one_device_and_of_these_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    files = [tuner.cache_file(CPU), tuner.cache_file(cuda)]
    assert "NVIDIA-H100-80GB-HBM3" in files[1].name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    files.append(tuner.cache_file(cuda))
    monkeypatch.setattr(tuner.triton, "__version__", "99.1")
    files.append(tuner.cache_file(cuda))
    monkeypatch.setattr(tuner, "_sources", lambda: "0f0f")
    files.append(tuner.cache_file(cuda))
    assert len(set(files)) == 5
    assert "99.1" in files[-1].name
    assert "0f0f" in files[-1].name


def test_what_is_compiled_differently_has_another_key(keys):
    plain = experts(9, 2, 3, 24, 40, torch.bfloat16)
    run("triton", plain)
    with torch.no_grad():
        experts_mlp(plain.x, plain.ids, plain.weights, plain.w1, plain.w3, plain.w2, impl="triton")
    found = list(keys)
    # With and without gradients; down projection, input gradient of two projections; three weights, of which the last
    # gathers the other operand; up projection in training and in inference. The down projection is the same in both.
    assert len(found) == 9
    assert len(set(found)) == 7, found
    up = sorted({key for key in found if key.startswith("up_projection")})
    assert [key.replace("save=False", "save=True") for key in up] == [up[1]] * 2
    for other in (
        replace(plain, activation="gelu"),
        replace(plain, w3=None),
        replace(plain, w1=plain.w1.mT.contiguous().mT),
        experts(9, 2, 3, 24, 40, torch.bfloat16, biased=True),
        experts(9, 2, 3, 24, 40, torch.float16),
    ):
        keys.clear()
        run("triton", other)
        assert set(keys) - set(found), other


def test_sums_and_what_is_added_to_have_keys_of_their_own(keys):
    p = problem(layout("flat", [[5, 4]]), 16, 32, torch.bfloat16)
    torch.ops.moesaic.grouped_mm_weight_grad(p.x, p.grad, p.group_sizes, p.w, "triton")
    for dtype in (torch.float32, torch.bfloat16):
        accumulate_weight_grad(torch.zeros_like(p.w, dtype=dtype), p.x, p.grad, p.group_sizes, impl="triton")
    grouped_mm(p.x, p.w, p.group_sizes, impl="triton")
    grouped_mm(p.x, p.w, p.group_sizes, impl="triton", out_dtype=torch.float32)
    grouped_mm(p.x, p.w.mT.contiguous().mT, p.group_sizes, impl="triton")
    assert len(set(keys)) == len(keys) == 6


def test_whatever_fails_is_skipped_and_named(monkeypatch, caplog):
    good = configs._INTERPRETED
    bad = [replace(good, BN=16), replace(good, BM=16)]
    errors = {bad[0]: OutOfResources(300, 200, "shared memory"), bad[1]: RuntimeError("no such instruction")}
    monkeypatch.setattr(tuner, "neighbours", lambda default: [bad[0], good, bad[1]])

    def time(run, config, device):
        if config in errors:
            raise errors[config]
        return 1.0

    monkeypatch.setattr(tuner, "_time", time)
    with tuner.tuning(), caplog.at_level(logging.WARNING):
        one_product()
    [entry] = json.loads(tuner.cache_file(CPU).read_text()).values()
    assert entry["config"]["BN"] == good.BN
    assert [name.split(", ")[:2] for name in entry["failed"]] == [["BM=16", "BN=32"], ["BM=32", "BN=16"]]
    assert "no such instruction" in caplog.text
    assert "BM=16, BN=32" in caplog.text


def test_a_configuration_that_breaks_the_gpu_is_named(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuner, "_time", fails)
    monkeypatch.setattr(tuner, "_synchronize", fails)
    with tuner.tuning(), pytest.raises(RuntimeError, match="BM=32, BN=32.* broke the GPU's context"):
        one_product()


def test_a_rank_among_several_does_not_tune_within_a_call(monkeypatch):
    monkeypatch.setenv("MOESAIC_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="call moesaic.parallel.tune_kernels before training"):
        one_product()
