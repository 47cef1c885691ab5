"""Weights that are tied by the config but not in fact, or the other way round: nothing is lost on the way to a file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.checkpoint import CheckpointError
from moesaic.checkpoint import load as read_checkpoint
from moesaic.integrations.transformers import convert as module
from moesaic.integrations.transformers import export_pretrained, load_pretrained, swap_moe
from moesaic.integrations.transformers.convert import convert
from moesaic.integrations.transformers.upcycle import upcycle
from tests.integrations.families import make_model, token_ids
from tests.integrations.test_saving import tensors_of
from tests.integrations.test_upcycle import make_dense

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def untied(folder):
    """Give a checkpoint whose config ties the head a head of its own, as a merged adapter does."""
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING] * 1.5 + 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose config says that the head is the embedding, which it is not."""
    folder = tmp_path_factory.mktemp("tied")
    make_model("Qwen3-MoE", tie_word_embeddings=True).save_pretrained(folder)
    return untied(folder)


def logits_of(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=token_ids(2, 9)).logits


def says_tied(folder):
    return json.loads((Path(folder) / "config.json").read_text())["tie_word_embeddings"]


def test_a_head_of_its_own_is_exported(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    export_pretrained(swap_moe(model), tmp_path / "swapped")
    export_pretrained(load_pretrained(checkpoint), tmp_path / "loaded")
    convert(checkpoint, tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "back")
    expected = tensors_of(checkpoint)
    for name in ("swapped", "loaded", "back"):
        found = tensors_of(tmp_path / name)
        assert torch.equal(found[HEAD], expected[HEAD])
        assert found.keys() == expected.keys()
        assert torch.equal(logits_of(tmp_path / name), logits_of(checkpoint))
        # Readers that trust the config alone are not misled.
        assert not says_tied(tmp_path / name)
    # The model in memory stays what it was.
    assert model.config.tie_word_embeddings


def test_a_head_of_its_own_is_upcycled(tmp_path):
    make_dense("Llama", tmp_path / "dense", tie_word_embeddings=True)
    upcycle(untied(tmp_path / "dense"), tmp_path / "moe", experts=4, top_k=2)
    torch.testing.assert_close(logits_of(tmp_path / "moe"), logits_of(tmp_path / "dense"), rtol=1e-4, atol=1e-5)


def load_and_export(folder, shared):
    meshes = moesaic.build_meshes(tp=2, ep=2, device_type="cpu")
    export_pretrained(load_pretrained(folder, meshes), f"{folder}-out")
    model = swap_moe(AutoModelForCausalLM.from_pretrained(shared))
    model.lm_head.weight = model.model.embed_tokens.weight
    export_pretrained(moesaic.parallelize(model, meshes), f"{shared}-out")


def test_sharded(ranks, checkpoint, tmp_path):
    make_model("Mixtral").save_pretrained(tmp_path / "shared")
    ranks(load_and_export, 2, str(checkpoint), str(tmp_path / "shared"))
    found, expected = tensors_of(f"{checkpoint}-out"), tensors_of(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert HEAD not in tensors_of(tmp_path / "shared-out")
    assert says_tied(tmp_path / "shared-out")


def test_one_parameter_that_the_config_leaves_apart_stays_one(tmp_path):
    model = make_model("Mixtral")
    model.lm_head.weight = model.model.embed_tokens.weight
    expected = model(input_ids=token_ids(2, 9)).logits.detach()
    swap_moe(model)
    export_pretrained(model, tmp_path / "export")
    model.save_pretrained(tmp_path / "save")
    for name in ("export", "save"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        torch.testing.assert_close(loaded(input_ids=token_ids(2, 9)).logits, expected, rtol=1e-4, atol=1e-5)


def test_equal_numbers_are_written_once(tmp_path):
    model = make_model("Mixtral", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    export_pretrained(swap_moe(model), tmp_path / "out")
    assert HEAD not in tensors_of(tmp_path / "out")
    assert says_tied(tmp_path / "out")


def test_a_checkpoint_with_only_the_head(checkpoint, tmp_path):
    make_model("Mixtral", tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    expected = logits_of(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "m", tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "back")
    assert torch.equal(logits_of(tmp_path / "back"), expected)
    # Training reads it into a model, which has both names.
    model = load_pretrained(tmp_path / "m")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    read_checkpoint(tmp_path / "dcp/checkpoints", {"model": model.state_dict()})
    assert torch.equal(model.lm_head.weight, tensors[HEAD])


def test_the_verification_sees_a_tensor_that_is_lost(checkpoint, tmp_path, monkeypatch):
    convert(checkpoint, tmp_path / "dcp")
    to_file_names = module.to_file_names

    def forgetful(plain, state):
        return {name: tensor for name, tensor in to_file_names(plain, state).items() if name != HEAD}

    monkeypatch.setattr(module, "to_file_names", forgetful)
    with pytest.raises(CheckpointError, match=r"verification: .*missing: lm_head.weight"):
        convert(tmp_path / "dcp", tmp_path / "back")
