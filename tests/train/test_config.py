"""Settings: their checks, their JSON form, and the command line around them."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.cli import main
from moesaic.train.command import parse
from moesaic.train.config import TrainConfig, check, from_json, to_json
from moesaic.train.errors import UserError
from moesaic.train.model import model_config
from tests.train.conftest import MODEL


def test_json_form_gives_the_same_settings_back():
    config = TrainConfig(tp=2, dp_shard=3, betas=(0.8, 0.9), out=Path("somewhere"), data="x", tokenizer="y")
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    # Whether to resume is up to each call.
    assert from_json(to_json(dataclasses.replace(config, resume=True, choose_again=True))) == config


def test_a_run_of_an_older_version_is_resumed(tmp_path):
    settings = to_json(TrainConfig(steps=7, compute="local"))
    settings["experts"] = settings.pop("compute")
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
    manifest = tmp_path / "checkpoints" / "step-00000007" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    config = parse(["--resume", "--out", str(tmp_path), "--steps", "9"], leader=True)
    assert config == TrainConfig(steps=9, compute="local", out=tmp_path, resume=True)


def test_misspelt_keys_of_a_model_are_refused():
    values = {"model_type": "qwen3_moe", "num_expert": 8, "vocab_size": 5}
    with pytest.raises(UserError, match=r"its config has num_expert, .*; did you mean num_experts\?"):
        model_config(values, vocab_size=5, eos_id=0)
    # Keys of other programs may stay.
    values = {"model_type": "qwen3_moe", "num_experts": 8, "vocab_size": 5, "ep_size": 1, "auto_map": {}}
    assert model_config(values, vocab_size=5, eos_id=0).num_experts == 8


def test_settings_of_another_version_are_refused():
    with pytest.raises(UserError, match="unknown settings surprise"):
        from_json({**to_json(TrainConfig()), "surprise": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"seq_len": 1}, "--seq-len must be at least 2"),
        ({"dp_replicate": 0}, "--dp-replicate must be at least 1"),
        ({"dp_shard": 0}, "--dp-shard must be at least 1"),
        ({"lr": 0.0}, "--lr must be more than 0"),
        ({"lr": float("nan")}, "--lr must be a number, 0 or more"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm"),
        ({"min_lr_ratio": 1.5}, "--min-lr-ratio must be between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"save_every": -1}, "--save-every must be at least 0"),
    ],
    ids=str,
)
def test_values_no_run_could_work_with(change, message):
    check(TrainConfig())
    with pytest.raises(UserError, match=message):
        check(TrainConfig(**change))


def _fails(capsys, *arguments):
    """Exit status and error of a command line that fails before training."""
    status = main(["train", *arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return status, err


@pytest.fixture
def launched(monkeypatch):
    """Pretend that torchrun has started this process, one of many. No process group may be made."""

    def launch(world_size, rank=0):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr("torch.distributed.init_process_group", None)

    return launch


@pytest.mark.parametrize(
    ("world_size", "arguments", "message"),
    [
        (
            4,
            ["--tp", "3"],
            r"dp_replicate \* cp \* tp = 1 \* 1 \* 3 = 3 must divide the world size 4.*Nearest legal choices",
        ),
        (4, ["--ep", "4", "--etp", "2"], r"ep \* etp = 4 \* 2 = 8 must divide the world size 4.*Nearest legal"),
        (4, ["--dp-shard", "2", "--tp", "1"], r"must equal the world size 4"),
        (1, ["--tp", "2"], "world size 1"),
        (8, ["--tp", "8"], "--tp 8 does not divide the model's num_key_value_heads, 4; what does: 1, 2, 4"),
        (
            64,
            ["--ep", "64", "--batch-size", "64"],
            "--ep: 64 ranks cannot share 32 experts; what fits: 1, 2, 4, 8",
        ),
        (4, ["--batch-size", "6"], "--batch-size 6 does not divide by 4 data parallel ranks.*; 8 does"),
        (4, ["--batch-size", "8", "--accumulate", "4"], "--batch-size 8 .* times the 4 passes .*; 16 does"),
        (1, ["--compile", "--recompute", "full"], "--compile: not with --recompute full"),
        (1, ["--compile", "--main-grads", "--compute", "local"], "--compile: not with --main-grads"),
        (1, ["--dtype", "pure-bf16"], "--dtype pure-bf16: .* use --dtype\\s+bf16"),
        (4, ["--ranks-per-node", "3"], "ranks_per_node: got 3, and there are 4 ranks in all.*choose one of 1, 2, 4"),
    ],
    ids=str,
)
def test_an_illegal_layout_is_an_error_before_any_process_group(launched, capsys, world_size, arguments, message):
    launched(world_size)
    status, err = _fails(capsys, *arguments)
    assert status == 2
    assert re.search(message, err, re.DOTALL), err


def test_only_the_first_rank_speaks(launched, capsys):
    launched(4, rank=1)
    assert _fails(capsys, "--tp", "3") == (2, "")
    with pytest.raises(SystemExit):
        main(["train", "--no-such-flag"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "nonesuch"],
            "--model nonesuch: no such file or folder, and this package has only qwen3-moe-small",
        ),
        (["--device", "nonesuch"], "--device nonesuch"),
        (["--device", "cpu:1"], "--device takes a type"),
        (["--data", "/no/such/place"], "--data /no/such/place: there is no such file or folder"),
        (["--tokenizer", "/no/such/place"], "--tokenizer /no/such/place"),
        (["--resume"], "--resume: no run in runs/ has a checkpoint; give its folder with --out"),
        (["--choose-again"], "--choose-again: a new run chooses anyway; add --resume to continue one"),
        (["--resume", "--out", "nowhere"], "--resume: there is no run in nowhere"),
        (["--out", "full"], "--out full is not empty. Add --resume to continue the run in it, or choose"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_say_which_flag(tmp_path, monkeypatch, capsys, corpus, cache, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full", "something").touch()
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    small = ["--data", str(corpus), "--model", str(tmp_path / "model.json")]
    status, err = _fails(capsys, *small, *arguments)
    assert status == 2
    assert message in err
    # Nothing was begun.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model.json"]


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, err = _fails(capsys)
    assert status == 2
    assert "pip install '.[train]'" in err


def test_usage(capsys):
    assert main(["--help"]) == 0
    assert "train  " in capsys.readouterr().out
    assert main([]) == 2
    assert main(["nonesuch"]) == 2
    assert "'nonesuch' is not a command" in capsys.readouterr().err


def test_help_is_quick_and_tells_every_flag(fresh_python):
    code = """
import sys
from moesaic.cli import main
try:
    main(["train", "--help"])
except SystemExit as exit:
    assert exit.code == 0
loaded = {"transformers", "tokenizers", "datasets", "tensorboard"} & set(sys.modules)
assert not loaded, loaded
"""
    out = fresh_python(code).stdout
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in out


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "moesaic", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "usage: moesaic" in done.stdout
