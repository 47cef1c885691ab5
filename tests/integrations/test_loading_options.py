"""`load_pretrained`: what it leaves out of the files if told to, and what it passes on."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import build_meshes, parallelize
from moesaic.integrations.transformers import load_pretrained, swap_moe
from moesaic.integrations.transformers.convert import convert
from moesaic.integrations.transformers.folding import fold
from moesaic.train.architecture import find_model
from moesaic.train.config import TrainConfig, with_defaults
from moesaic.train.model import load_model
from tests.integrations.families import make_model, make_published_llama4, token_ids
from tests.integrations.test_loading_files import changed

# Kinds of layers that predict several tokens, as they are in published files.
MTP = {
    "DeepSeek-V3": "model.layers.3.eh_proj.weight",
    "GLM-4-MoE": "model.layers.3.shared_head.norm.weight",
    "MiniMax-M2": "model.mtp_modules.0.norm.weight",
}


def assert_same_logits(model, expected):
    ids = token_ids(2, 9)
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_language_model_of_a_published_llama4(tmp_path, caplog):
    whole = make_published_llama4()
    whole.save_pretrained(tmp_path / "m")
    others = "multi_modal_projector.linear_1.weight, vision_model."
    with pytest.raises(ValueError, match=rf"unexpected: {others}\* \(\d+\)\. ignore_unexpected=True"):
        load_pretrained(tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        assert_same_logits(load_pretrained(tmp_path / "m", ignore_unexpected=True), whole)
    assert f"tensors that Llama4ForCausalLM does not have: {others}" in caplog.text
    settings = TrainConfig(model=str(tmp_path / "m"), ignore_unexpected=True)
    settings = with_defaults(settings, pretrained=True, own_aux_loss_coef=None)
    trained = load_model(settings, find_model(settings.model), build_meshes(), torch.device("cpu"), vocab_size=5)
    assert_same_logits(trained, whole)
    convert(tmp_path / "m", tmp_path / "dcp", ignore_unexpected=True)
    convert(tmp_path / "dcp", tmp_path / "text")
    assert_same_logits(load_pretrained(tmp_path / "text"), whole)


@pytest.mark.parametrize("family", MTP)
def test_layers_that_predict_several_tokens_are_left_out(tmp_path, family):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {MTP[family]: torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"unexpected: {MTP[family]}. ignore_unexpected=True"):
        load_pretrained(tmp_path)
    assert_same_logits(load_pretrained(tmp_path, ignore_unexpected=True), model)


def test_missing_tensors_are_never_left_out(mixtral, tmp_path):
    def spoil(tensors):
        tensors["model.norm.scale"] = tensors.pop("model.norm.weight")

    with pytest.raises(ValueError, match=r"missing: model.norm.weight$"):
        load_pretrained(changed(mixtral, tmp_path / "m", spoil), ignore_unexpected=True)


def test_names_are_folded_where_nothing_known_begins_so():
    extra = [f"m.layers.{i}.extra.{x}" for i in (0, 1) for x in "ab"]
    names = [*(f"vision.{i}.w" for i in range(3)), *extra, "m.new.w"]
    known = ["m.layers.0.w", "m.layers.1.w"]
    assert fold(names, known) == "vision.* (3), m.layers.*.extra.* (4), m.new.w"


def test_values_of_the_config_and_options_of_the_swap(mixtral, unchecked):
    model = load_pretrained(mixtral, attn_implementation="eager", sliding_window=5, aux_loss_coef=0.1)
    assert model.config._attn_implementation == "eager"
    assert model.config.sliding_window == 5
    assert model.model.layers[0].mlp.config.aux_loss_coef == 0.1
    with pytest.raises(TypeError, match=r"meshes: expected the result of moesaic.build_meshes\(\), got str"):
        load_pretrained(mixtral, "cpu")
    with pytest.raises(TypeError, match=r"aux_los_coef: .*no such option; did you mean aux_loss_coef\?"):
        load_pretrained(mixtral, aux_los_coef=0.1)


def test_a_revision_reaches_every_file(mixtral, tmp_path, monkeypatch, fresh_python):
    repository = tmp_path / "models--someone--mixtral"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    for revision, number in {"main": 1, "older": 2}.items():
        (repository / "refs" / revision).write_text(str(number) * 40)

        def write(tensors, number=number):
            tensors["model.norm.weight"].fill_(number)

        changed(mixtral, repository / "snapshots" / (str(number) * 40), write)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fresh_python(
        "from moesaic.integrations.transformers import load_pretrained\n"
        "for revision, number in ((None, 1), ('older', 2)):\n"
        "    model = load_pretrained('someone/mixtral', revision=revision)\n"
        "    assert model.model.norm.weight.eq(number).all()"
    )


def test_offloaded_models_are_refused():
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="accelerate has offloaded 'model.embed_tokens'"):
        swap_moe(accelerate.cpu_offload(make_model("Mixtral")))
    with pytest.raises(ValueError, match="accelerate has offloaded 'model.embed_tokens'"):
        parallelize(accelerate.cpu_offload(swap_moe(make_model("Mixtral"))), build_meshes())
