"""`moesaic convert` and `moesaic upcycle`, from the command line in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

import moesaic
from moesaic import checkpoint, cli
from moesaic.integrations.transformers import convert as module
from moesaic.integrations.transformers import load_pretrained
from tests.integrations.families import make_model
from tests.integrations.test_saving import assert_same_tensors, tensors_of
from tests.integrations.test_upcycle import make_dense

pytestmark = pytest.mark.slow


def run(capsys, *arguments, status=0):
    assert cli.main([str(a) for a in arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


@pytest.mark.parametrize("family", ["Qwen2-MoE", "DeepSeek-V3", "gpt-oss"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_there_and_back(tmp_path, capsys, family, tied):
    model = make_model(family, tie_word_embeddings=tied).bfloat16()
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    assert "written and verified" in run(capsys, "convert", tmp_path / "hf", tmp_path / "dcp")
    assert "written and verified" in run(capsys, "convert", tmp_path / "dcp", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tensors_of(tmp_path / "hf"))
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[name].to(tensor), tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3"])
def test_casting(tmp_path, capsys, family):
    model = make_model(family)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    call = ("convert", tmp_path / "hf", tmp_path / "cast", "--to", "hf")
    assert "already has this format; give --dtype to cast it" in run(capsys, *call, status=2)
    assert "written and verified" in run(capsys, *call, "--dtype", "bfloat16")
    # In DeepSeek-V3 the correction bias stays in fp32.
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "cast", tensors_of(tmp_path / "theirs"))
    assert json.loads((tmp_path / "cast/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "cast/tokenizer.json").read_text() == "{}"


def test_the_checkpoint_is_one_that_training_reads(tmp_path, capsys):
    make_model("Mixtral").save_pretrained(tmp_path / "hf")
    run(capsys, "convert", tmp_path / "hf", tmp_path / "dcp", "--to", "dcp")
    model = load_pretrained(tmp_path / "hf")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = {"model": model.state_dict()}
    assert checkpoint.load(tmp_path / "dcp/checkpoints", state).step == 0
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in expected.items())


def save_run(folder, source, layout):
    model = load_pretrained(source, moesaic.build_meshes(**layout, device_type="cpu"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    state = {"model": get_model_state_dict(model), "optimizer": {"lm_head.weight": {"step": torch.ones(())}}}
    checkpoint.save(Path(folder) / "checkpoints", 7, state, {})
    moesaic.integrations.transformers.export_pretrained(model, Path(folder) / "export")


def test_the_checkpoint_of_a_run_on_ranks(ranks, tmp_path, capsys):
    model = make_model("Qwen3-MoE", num_experts=5, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"model": model.config.to_dict()}, default=str))
    ranks(save_run, 4, str(tmp_path / "run"), str(tmp_path / "hf"), {"ep": 4, "tp": 2})
    expected = tensors_of(tmp_path / "run/export")
    assert not torch.equal(expected["model.norm.weight"], model.model.norm.weight)
    for name, source in {"a": tmp_path / "run", "b": tmp_path / "run/checkpoints/step-00000007"}.items():
        run(capsys, "convert", source, tmp_path / name)
        assert_same_tensors(tmp_path / name, expected)


def test_casts(tmp_path, capsys):
    make_model("DeepSeek-V3").save_pretrained(tmp_path / "hf")
    run(capsys, "convert", tmp_path / "hf", tmp_path / "dcp", "--dtype", "bfloat16")
    run(capsys, "convert", tmp_path / "dcp", tmp_path / "half")
    whole = tensors_of(tmp_path / "hf")
    kept = {name for name in whole if "e_score_correction_bias" in name}
    assert kept
    half = {name: tensor if name in kept else tensor.bfloat16() for name, tensor in whole.items()}
    assert_same_tensors(tmp_path / "half", half)
    run(capsys, "convert", tmp_path / "dcp", tmp_path / "single", "--dtype", "float32")
    assert_same_tensors(tmp_path / "single", {name: tensor.float() for name, tensor in half.items()})
    for name, dtype in {"half": "bfloat16", "single": "float32"}.items():
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("place", ["tokenizer", "export", "."])
def test_the_tokenizer_of_a_run_comes_along(tmp_path, capsys, place):
    make_model("Mixtral").save_pretrained(tmp_path / "hf")
    run(capsys, "convert", tmp_path / "hf", tmp_path / "dcp")
    folder = tmp_path / "dcp" / place
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates/short.jinja").write_text("short")
    (folder / "tokenizer.json").write_text("{}")
    run(capsys, "convert", tmp_path / "dcp", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out/additional_chat_templates/short.jinja").read_text() == "short"


def test_adapters_are_refused(tmp_path, capsys):
    model = make_model("Mixtral")
    checkpoint.save(tmp_path / "checkpoints", 1, {"model": {"model.q_proj.lora_A.weight": torch.ones(2)}}, {})
    (tmp_path / "config.json").write_text(json.dumps({"model": model.config.to_dict()}, default=str))
    assert "has adapters beside the weights" in run(capsys, "convert", tmp_path, tmp_path / "x", status=2)


def test_the_verification_sees_one_wrong_bit(tmp_path, capsys, monkeypatch):
    make_model("Mixtral").save_pretrained(tmp_path / "hf")
    run(capsys, "convert", tmp_path / "hf", tmp_path / "dcp")
    write = module.write_pretrained

    def spoiled(plain, tensors, path, **arguments):
        write(plain, tensors, path, **arguments)
        written = load_file(Path(path) / "model.safetensors")
        written["model.layers.1.input_layernorm.weight"].view(torch.int32)[3] ^= 1
        save_file(written, Path(path) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_pretrained", spoiled)
    error = run(capsys, "convert", tmp_path / "dcp", tmp_path / "out", status=1)
    assert "verification: 'model.layers.1.input_layernorm.weight' differs from the source" in error
    assert not (tmp_path / "out").exists()


def test_errors(tmp_path, capsys):
    make_model("Mixtral").save_pretrained(tmp_path / "hf")
    assert "--to hf: " in run(capsys, "convert", tmp_path / "hf", tmp_path / "x", "--to", "hf", status=2)
    assert "is also the source" in run(capsys, "convert", tmp_path / "hf", tmp_path / "hf", status=2)
    assert "does not describe a model" in run_with_spoiled_config(tmp_path, capsys)
    (tmp_path / "dcp/config.json").unlink()
    file = next((tmp_path / "dcp/checkpoints/step-00000000").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged" in run(capsys, "convert", tmp_path / "dcp", tmp_path / "x", status=1)
    assert not (tmp_path / "x").exists()


def run_with_spoiled_config(tmp_path, capsys):
    run(capsys, "convert", tmp_path / "hf", tmp_path / "dcp")
    (tmp_path / "dcp/config.json").write_text("{}")
    return run(capsys, "convert", tmp_path / "dcp", tmp_path / "x", status=2)


def test_upcycle(tmp_path, capsys):
    make_dense("Llama", tmp_path / "dense")
    arguments = ("upcycle", tmp_path / "dense", tmp_path / "moe", "--experts", 4, "--top-k", 2)
    assert run(capsys, *arguments, "--granularity", 2, "--noise", 0.1, "--seed", 3) == f"{tmp_path / 'moe'}: written\n"
    assert load_pretrained(tmp_path / "moe").config.num_local_experts == 4
    assert "granularity 4" in run(capsys, *arguments, "--granularity", 4, status=2)


@pytest.mark.parametrize("command", ["convert", "upcycle"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: moesaic {command}" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert command in capsys.readouterr().out


def test_targets_are_new_and_not_the_source(tmp_path):
    make_model("Mixtral").save_pretrained(tmp_path / "hf")
    (tmp_path / "link").symlink_to("hf")
    with pytest.raises(ValueError, match="target: .* is also the source"):
        module.convert(tmp_path / "hf", tmp_path / "link")
    module.convert(tmp_path / "hf", tmp_path / "dcp")
    with pytest.raises(ValueError, match="target: .* not empty"):
        module.convert(tmp_path / "dcp", tmp_path / "hf")
