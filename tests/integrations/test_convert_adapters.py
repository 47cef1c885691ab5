"""`moesaic convert` with adapters: between our names and peft's, and added to the weights of a model."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

import moesaic
from moesaic import checkpoint
from moesaic.integrations.transformers import load_pretrained, swap_moe
from tests.integrations.families import assert_close, make_model, token_ids
from tests.integrations.test_convert import run
from tests.integrations.test_saving import tensors_of

peft = pytest.importorskip("peft")
from moesaic.integrations.peft import load_adapters, save_adapters  # noqa: E402, needs peft
from tests.integrations.test_peft import FILE, by_peft, config_of, pytestmark  # noqa: E402, F401

OTHERS = ("Llama-4", "gpt-oss", "DeepSeek-V3")
FAMILIES = ["Mixtral", *(pytest.param(f, marks=pytest.mark.long) for f in OTHERS)]


def save(tmp_path, family):
    """The model in ``base``, its adapters as peft writes them in ``theirs``, and peft's model."""
    base = make_model(family)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    plain = by_peft(base, config_of(family, base_model_name_or_path=str(tmp_path / "base")))
    plain.save_pretrained(tmp_path / "theirs")
    return plain


def assert_same_file(one, other):
    a, b = load_file(one / FILE), load_file(other / FILE)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_them_to_the_weights(tmp_path, capsys, family):
    plain, ids = save(tmp_path, family), token_ids(2, 9)
    call = ("convert", tmp_path / "base", tmp_path / "merged", "--adapter", tmp_path / "theirs")
    assert "written and verified" in run(capsys, *call)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(merged(input_ids=ids).logits, plain(input_ids=ids).logits, "logits")
    if family == "Mixtral":
        return
    # Rounded once, after the sum.
    half = [*call, "--dtype", "bfloat16"]
    half[2] = tmp_path / "half"
    run(capsys, *half)
    single, halves = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "half")
    assert halves.keys() == single.keys()
    for name, tensor in halves.items():
        assert torch.equal(tensor, single[name].to(tensor.dtype)), name
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
def test_to_our_names_and_back(tmp_path, capsys, family):
    save(tmp_path, family)
    assert "written and verified" in run(capsys, "convert", tmp_path / "theirs", tmp_path / "ours")
    # Under the names and in the layouts of a model of ours, which takes them as they are.
    model = swap_moe(make_model(family))
    load_adapters(model, tmp_path / "theirs")
    meant = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in meant.items()}}
    assert checkpoint.load(tmp_path / "ours/checkpoints", state).step == 0
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in meant.items())
    run(capsys, "convert", tmp_path / "ours", tmp_path / "back", "--to", "peft")
    assert_same_file(tmp_path / "back", tmp_path / "theirs")
    # The weights of the model are not needed, only its config.
    (tmp_path / "base/model.safetensors").unlink()
    run(capsys, "convert", tmp_path / "theirs", tmp_path / "again", "--base", tmp_path / "base")
    run(capsys, "convert", tmp_path / "theirs", tmp_path / "half", "--to", "peft", "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "half" / FILE).values()} == {torch.bfloat16}


@pytest.mark.long
def test_a_pair_of_tensors_for_each_expert(tmp_path, capsys):
    plain, ids = save(tmp_path, "Mixtral"), token_ids(2, 9)
    run(capsys, "convert", tmp_path / "theirs", tmp_path / "each", "--to", "peft", "--each-expert")
    assert {t.ndim for name, t in load_file(tmp_path / "each" / FILE).items() if ".experts." in name} == {2}
    back = peft.PeftModel.from_pretrained(make_model("Mixtral"), tmp_path / "each")
    assert_close(back(input_ids=ids).logits, plain(input_ids=ids).logits, "logits")
    # Together again: a factor of both gate and up projection was there twice, and so the rank is larger.
    run(capsys, "convert", tmp_path / "each", tmp_path / "fused", "--to", "peft", "--base", tmp_path / "base")
    fused = peft.PeftModel.from_pretrained(make_model("Mixtral"), tmp_path / "fused")
    assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits, "logits of the fused form")
    run(capsys, "convert", tmp_path / "base", tmp_path / "merged", "--adapter", tmp_path / "each")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(merged(input_ids=ids).logits, plain(input_ids=ids).logits, "logits of the merged model")


def save_run(folder, base, adapter, layout):
    model = load_pretrained(base, moesaic.build_meshes(**layout, device_type="cpu"), adapter=adapter)
    checkpoint.save(Path(folder) / "checkpoints", 7, {"model": get_model_state_dict(model)}, {})
    save_adapters(model, Path(folder) / "saved")


@pytest.mark.long
def test_a_run_on_ranks(ranks, tmp_path, capsys):
    save(tmp_path, "Mixtral")
    folder = tmp_path / "run"
    ranks(save_run, 2, folder, tmp_path / "base", tmp_path / "theirs", {"ep": 2, "tp": 2})
    values = json.loads((tmp_path / "base/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model": values}))
    call = ("convert", folder, tmp_path / "out", "--to", "peft")
    assert "there is no" in run(capsys, *call, status=2)
    (tmp_path / "theirs/adapter_config.json").rename(folder / "adapter_config.json")
    run(capsys, *call)
    for other in (folder / "saved", tmp_path / "theirs"):
        assert_same_file(tmp_path / "out", other)
    assert "--to peft to get them alone" in run(capsys, "convert", folder, tmp_path / "x", status=2)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_mistakes(tmp_path, capsys):
    save(tmp_path, "Mixtral")
    base, theirs, x = (tmp_path / name for name in ("base", "theirs", "x"))
    for arguments, message in [
        ((theirs, x, "--to", "hf"), "has adapters and no weights; give the model in its place, and --adapter"),
        ((base, x, "--to", "peft"), "has weights and no adapters"),
        ((base, x, "--to", "dcp", "--adapter", theirs), "--adapter: adapters are added to a transformers checkpoint"),
        ((base, x, "--base", base), "--base: names the model of adapters; leave it out"),
        ((theirs, x, "--each-expert"), "--each-expert: is a form of adapters; add --to peft, this writes dcp"),
        ((theirs, x, "--base", x), "--base: the model .* cannot be read"),
        ((base, x, "--adapter", base), "there is no .*adapter_config.json"),
    ]:
        error = run(capsys, "convert", *arguments, status=2)
        assert re.search(message, error), error
        assert not x.exists()
    tensors = load_file(theirs / FILE)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:1].clone()}, theirs / FILE)
    assert "other shapes" in run(capsys, "convert", base, x, "--adapter", theirs, status=2)
    tied = make_model("Mixtral", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    wrapped = peft.get_peft_model(copy.deepcopy(tied), config)
    wrapped.save_pretrained(tmp_path / "of_tied", save_embedding_layers=False)
    error = run(capsys, "convert", tmp_path / "tied", x, "--adapter", tmp_path / "of_tied", status=2)
    assert "'lm_head.weight' is tied to another weight" in error


@pytest.mark.parametrize("options", [("--adapter", "theirs"), ("--to", "peft")])
def test_without_peft_it_says_what_to_install(tmp_path, monkeypatch, capsys, options):
    save(tmp_path, "Mixtral")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.chdir(tmp_path)
    error = run(capsys, "convert", "base" if "--adapter" in options else "theirs", "x", *options, status=2)
    assert "adapters need the package peft: pip install '.[lora]'" in error
