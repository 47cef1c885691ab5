"""What is in a checkpoint's files, and what is not: every name is accounted for, before a number is read."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter

import moesaic
from moesaic.integrations.transformers import load_pretrained, naming, swap_moe
from moesaic.testing.pool import RankError
from tests.integrations.families import FAMILIES, make_model, token_ids

pytestmark = pytest.mark.slow

SWAPPED = [family for family in FAMILIES if family != "Phi-MoE"]


def changed(folder, target, change):
    """A copy of a checkpoint of one file with other tensors in it."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def _is_tied(model):
    return model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", SWAPPED)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_one_process_gets_what_transformers_loads(tmp_path, family, tied):
    plain = make_model(family, tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path)
    mine = load_pretrained(tmp_path)
    assert not mine.training
    ids = token_ids(2, 9)
    torch.testing.assert_close(mine(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    # Nemotron-H never ties, whatever its config says.
    assert _is_tied(mine) == _is_tied(plain) == (tied and family != "Nemotron-H")
    for (name, buffer), (theirs_name, theirs) in zip(
        mine.model.rotary_emb.named_buffers() if hasattr(mine.model, "rotary_emb") else (),
        plain.model.rotary_emb.named_buffers() if hasattr(plain.model, "rotary_emb") else (),
        strict=True,
    ):
        assert name == theirs_name
        assert torch.equal(buffer, theirs)
    assert mine.state_dict().keys() == swap_moe(plain).state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name


def test_dtypes(mixtral):
    assert load_pretrained(mixtral).dtype == torch.float32
    half = load_pretrained(mixtral, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    whole = load_pretrained(mixtral).state_dict()
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in half.state_dict().items())


@pytest.mark.parametrize("family", SWAPPED)
def test_rounding_is_that_of_transformers(tmp_path, family):
    """Files of two dtypes, within an expert projection too, for a model in a third."""
    make_model(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    first_of_each = {re.sub(r"[0-9]+", "", name): name for name in reversed(tensors)}.values()
    save_file({n: t if n in first_of_each else t.half() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    theirs = swap_moe(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)).state_dict()
    mine = load_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def test_options_reach_the_layers(mixtral):
    layer = load_pretrained(mixtral, impl="reference", aux_loss_coef=0.01).model.layers[0].mlp
    assert layer.config.aux_loss_coef == 0.01


def test_differences_are_listed(mixtral, tmp_path):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.input_layernorm.weight"]
        tensors["model.layers.0.extra.weight"] = torch.zeros(3)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].to(
            torch.int8
        )

    with pytest.raises(ValueError, match="the files do not hold a MixtralForCausalLM") as caught:
        load_pretrained(changed(mixtral, tmp_path / "m", spoil))
    missing, unexpected, different = str(caught.value).split("config. ")[1].split("; ")
    assert missing == "missing: model.layers.1.input_layernorm.weight, model.norm.weight"
    assert unexpected == "unexpected: model.layers.0.extra.weight"
    assert "model.layers.0.self_attn.q_proj.weight is [3, 4] torch.float32, not [32, 32] torch.float32" in different
    assert "k_proj.weight is [16, 32] torch.int8" in different


def test_an_expert_that_is_missing_is_found_out(mixtral, tmp_path):
    name = next(n for n in load_file(mixtral / "model.safetensors") if ".experts.3.w2" in n)
    with pytest.raises(ValueError, match=r"different: model.layers.\d.mlp.experts.down_proj is \[7, 32, 24\]"):
        load_pretrained(changed(mixtral, tmp_path / "m", lambda tensors: tensors.pop(name)))
    name = name.replace("w2", "w1")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj' cannot be made from .*cannot concatenate"):
        load_pretrained(changed(mixtral, tmp_path / "n", lambda tensors: tensors.pop(name)))


def test_tied_weights_under_either_name(tmp_path):
    make_model("Mixtral", tie_word_embeddings=True).save_pretrained(tmp_path / "m")

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def swap(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    for change in (repeat, swap):
        model = load_pretrained(changed(tmp_path / "m", tmp_path / change.__name__, change))
        assert _is_tied(model)
        assert torch.equal(
            model.lm_head.weight, load_file(tmp_path / "m/model.safetensors")["model.embed_tokens.weight"]
        )


def test_files_that_are_damaged_or_not_there(mixtral, tmp_path):
    folder = changed(mixtral, tmp_path / "m", lambda tensors: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match="is damaged"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load_pretrained(folder)


def test_an_index_that_does_not_agree_is_refused(tmp_path):
    make_model("Mixtral").save_pretrained(tmp_path, max_shard_size="40KB")
    place = tmp_path / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    index["weight_map"]["ghost.weight"] = min(files)
    place.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the index and its files do not agree on \['ghost.weight'\]"):
        load_pretrained(tmp_path)
    place.write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is damaged: KeyError: 'weight_map'"):
        load_pretrained(tmp_path)


class _Strange(ConversionOps):
    def convert(self, input_dict, **kwargs):
        return {name: tensors[0].cumsum(0) for name, tensors in input_dict.items()}


def test_a_conversion_that_is_not_known_raises_by_name(mixtral, monkeypatch):
    known = naming.get_model_conversion_mapping
    strange = WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", operations=[_Strange()])
    monkeypatch.setattr(naming, "get_model_conversion_mapping", lambda model: [*known(model), strange])
    with pytest.raises(NotImplementedError, match=r"_Strange of \['model.layers.0.self_attn.q_proj.weight'\]"):
        load_pretrained(mixtral)


def test_quantized_checkpoints_are_refused(mixtral, tmp_path):
    folder = changed(mixtral, tmp_path / "m", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized"):
        load_pretrained(folder)


def load_where_one_rank_sees_nothing(folder, layout):
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    rank = torch.distributed.get_rank()
    load_pretrained(folder if rank != 1 else Path(folder) / "elsewhere", meshes)


def load_where_one_rank_has_another_config(folders, layout):
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    load_pretrained(folders[torch.distributed.get_rank()], meshes)


def load_without_meshes(folder):
    load_pretrained(folder)


def test_failures_are_those_of_all_ranks(ranks, mixtral, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks(load_where_one_rank_sees_nothing, 2, str(mixtral), {"ep": 2})
    assert set(caught.value.failures) == {0, 1}
    assert all("elsewhere" in text and "still running" not in text for text in caught.value.failures.values())
    # Errors of every kind, also those that do not say so by their type.
    other = changed(mixtral, tmp_path / "other", lambda tensors: None)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "nope"}))
    with pytest.raises(RankError) as caught:
        ranks(load_where_one_rank_has_another_config, 2, [str(mixtral), str(other)], {"ep": 2})
    assert all("nope" in text and "still running" not in text for text in caught.value.failures.values())
    with pytest.raises(RankError, match="meshes: there are 2 ranks"):
        ranks(load_without_meshes, 2, str(mixtral))


def test_a_name_on_the_hub_from_the_cache(mixtral, tmp_path, monkeypatch, fresh_python):
    repository = tmp_path / "models--someone--mixtral"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    changed(mixtral, repository / "snapshots" / ("0" * 40), lambda tensors: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fresh_python(
        "from moesaic.integrations.transformers import load_pretrained\n"
        "print(load_pretrained('someone/mixtral').num_parameters())"
    )
