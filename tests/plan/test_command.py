"""``moesaic plan``: what it says, and what it refuses."""

import json

import pytest
from transformers import AutoModelForCausalLM

from moesaic import cli
from moesaic.integrations.transformers import swap_moe
from moesaic.plan.hardware import as_toml, known, read_hardware
from moesaic.plan.model import problem
from moesaic.train.flops import PEAKS, flops_per_token
from tests.plan.small import config, config_file, small


def _run(capsys, *arguments):
    status = cli.main(["plan", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_it_prints_the_fastest_that_fit_and_says_whether_etp_pays(tmp_path, capsys):
    arguments = ("--model", config_file(tmp_path), "--gpus", 4, "--seq-len", 64, "--batch", 4, "--top", 2, "--json")
    status, out, _ = _run(capsys, *arguments)
    assert status == 0
    said = json.loads(out)
    shapes = small().shapes
    assert said["parameters"] == shapes.parameters == sum(w.numel for w in shapes.weights)
    assert len(said["plans"]) == 2
    first, second = said["plans"]
    assert first["seconds"]["total"] <= second["seconds"]["total"]
    for plan in said["plans"]:
        memory, layout = plan["memory"], plan["layout"]
        parts = ("weights", "gradients", "optimizer", "activations", "gathered", "working")
        assert memory["total"] == sum(memory[name] for name in parts)
        assert memory["optimizer"] == 2 * memory["weights"]
        assert layout["pp"] * layout["edp"] * layout["ep"] * layout["etp"] == 4
    assert "EP" in said["said"]


@pytest.mark.slow
def test_nothing_fits_and_what_would(tmp_path, capsys):
    arguments = ("--model", config_file(tmp_path), "--gpus", 2, "--seq-len", 64, "--batch", 4, "--memory", 1e-5)
    status, _, err = _run(capsys, *arguments)
    assert status == 1
    assert "legal layouts fits into" in err
    assert "The nearest needs" in err
    assert "--memory" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--model is missing"),
        (("--model", "no.json"), "there is no file no.json"),
        (("--model", "x", "--gpus", 0), "--gpus must be at least 1, not 0"),
        (("--model", "x", "--gpus", 12), "--gpus 12 are no whole nodes of --per-node 8"),
        (("--model", "x", "--weights", "bf16", "--dtype", "fp32"), "--weights bf16 computes in bf16"),
        (("--model", "x", "--memory", -1), "--memory must be more than 0 GB"),
    ],
    ids=str,
)
def test_errors_name_the_flag(capsys, arguments, said):
    status, _, err = _run(capsys, *arguments)
    assert status == 2
    assert said in err


def test_hardware_is_known_or_read_from_a_file_and_faults_are_named(tmp_path):
    assert known() == ["H100", "H200", "B200", "CPU"]
    file = tmp_path / "mine.toml"
    file.write_text(as_toml(read_hardware("h100")))
    mine = read_hardware(str(file))
    assert mine.name == "mine"
    assert mine.network == read_hardware("H100").network
    with pytest.raises(ValueError, match="no known device; choose from H100"):
        read_hardware("A1")
    file.write_text(as_toml(mine).replace("half_rows = 64", "half_rows = -1"))
    with pytest.raises(ValueError, match="half_rows must be a number above 0, got -1"):
        read_hardware(str(file))
    file.write_text("memory = 1")
    with pytest.raises(ValueError, match="flops, efficiency.* missing"):
        read_hardware(str(file))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"sliding_window": 8, "use_sliding_window": True}]
)
def test_arithmetic_and_peaks_are_those_of_a_run(changes):
    model = swap_moe(AutoModelForCausalLM.from_config(config(**changes)))
    assert small(**changes).shapes.flops(32) == flops_per_token(model, 32)
    for name in ("H100", "H200", "B200"):
        assert read_hardware(name).flops["bf16"] == PEAKS[name] * 1e12


def test_a_window_is_less_arithmetic():
    window = {"use_sliding_window": True, "sliding_window": 8}
    whole, cut = (small(**changes).shapes.flops(32) for changes in ({}, window))
    # Keys and values of 4 heads of 8, in 2 layers, forward and backward.
    assert whole - cut == 3 * 2 * (32 - 8) * 4 * (8 + 8) * 2


def test_layouts_that_parallelize_refuses_are_refused_in_its_words():
    assert problem(small(), tp=4, cp=2) is None
    assert "8 does not divide the 4 heads" in str(problem(small(), tp=8))
