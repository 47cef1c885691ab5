"""Damaged files of a model: one documented kind of error, which names the file; and nothing in them loads code."""

import contextlib
import json
import logging
import shutil
import struct

import hypothesis
import pytest
from hypothesis import strategies as st

from moesaic.checkpoint import CheckpointError
from moesaic.integrations.transformers import load_pretrained
from moesaic.integrations.transformers.convert import convert
from moesaic.train.errors import UserError
from moesaic.train.tokenizer import load as load_tokenizer
from tests.integrations.families import make_model

_DOCUMENTED = (OSError, ValueError, NotImplementedError, CheckpointError)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model in two files with an index."""
    folder = tmp_path_factory.mktemp("whole")
    make_model("Qwen3-MoE").save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def _copy(whole, target):
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(whole, target)


def _change(folder, name, change):
    file = folder / name
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "index.json is damaged: KeyError: 'weight_map'"),
        (lambda index: index.update(weight_map=[]), "index.json is damaged: weight_map must be an object, got list"),
        (
            lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], "../model.safetensors")),
            r"index.json: weight_map has '../model.safetensors' for '.*', which is no file in its folder",
        ),
        (lambda index: index["weight_map"].update({"lm_head.weight": 3}), "weight_map has 3 for 'lm_head.weight'"),
    ],
)
def test_an_index(whole, tmp_path, change, message):
    folder = _copy(whole, tmp_path / "m")
    _change(folder, "model.safetensors.index.json", change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_an_index_without_metadata_is_whole(whole, tmp_path):
    folder = _copy(whole, tmp_path / "m")
    _change(folder, "model.safetensors.index.json", lambda index: index.pop("metadata"))
    load_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": 3}, "config.json"),
        ({"model_type": "nonesuch"}, "config.json.*nonesuch"),
        ({"hidden_act": "nonesuch"}, "config.json.*nonesuch"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the files have"),
        ({"hidden_size": "32"}, "config.json.*hidden_size"),
        ({"num_attention_heads": 0}, "config.json.*num_attention_heads"),
        ({"rope_parameters": 3}, "config.json"),
        ({"attn_implementation": "someone/kernel"}, "config.json.* is 'someone/kernel', which is code"),
        ({"_attn_implementation": "someone/kernel"}, "attn_implementation is 'someone/kernel', which is code"),
        ({"attn_implementation": {"": 3}}, "config.json"),
    ],
    ids=str,
)
def test_a_config(whole, tmp_path, values, message):
    folder = _copy(whole, tmp_path / "m")
    _change(folder, "config.json", lambda config: config.update(values))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=str)
def test_what_is_no_json_object(whole, tmp_path, name, text):
    folder = _copy(whole, tmp_path / "m")
    assert (folder / name).is_file()
    (folder / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name} is damaged: it "):
        load_pretrained(folder)


def test_another_attention_needs_the_caller(whole, tmp_path, caplog):
    folder = _copy(whole, tmp_path / "m")
    _change(folder, "config.json", lambda config: config.update(attn_implementation="flash_attention_2"))
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(folder)
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert "attn_implementation 'flash_attention_2' is left out" in caplog.text
    assert load_pretrained(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_nobody_is_asked_to_run_code(whole, tmp_path, monkeypatch):
    """transformers would ask at a terminal; with a question there would be no answer, and the test would hang."""
    folder = _copy(whole, tmp_path / "m")
    (folder / "own.py").write_text("raise SystemExit('code of a config was run')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("somebody was asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 1)
    _change(folder, "config.json", lambda config: config.update(model_type="own", auto_map={"AutoConfig": "own.C"}))
    with pytest.raises(ValueError, match="config.json"):
        load_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", None]}})
    )
    with pytest.raises(UserError, match="transformers cannot load it"):
        load_tokenizer(folder)


_JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(), st.text(max_size=4), st.just([]), st.just({})
)


def _survives(folder, tmp_path):
    """Loaded, or refused in a documented way that says where; and the same by convert."""
    for work in (lambda: load_pretrained(folder), lambda: convert(folder, tmp_path / "out")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        said = None
        try:
            work()
        except _DOCUMENTED as error:
            said = str(error)
        assert said is None or str(folder) in said or "model" in said or "config" in said, said


@pytest.mark.parametrize("examples", [2, pytest.param(200, marks=pytest.mark.long)])
def test_any_value_in_a_config(whole, tmp_path, examples):
    names = sorted(json.loads((whole / "config.json").read_text()))

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(st.sampled_from(names), _JSON)
    def check(name, value):
        folder = _copy(whole, tmp_path / "m")
        _change(folder, "config.json", lambda config: config.update({name: value}))
        _survives(folder, tmp_path)

    check()


@pytest.mark.parametrize("examples", [2, pytest.param(200, marks=pytest.mark.long)])
def test_any_value_in_the_config_of_a_run(whole, tmp_path, examples):
    run = tmp_path / "run"
    convert(whole, run)
    good = json.loads((run / "config.json").read_text())

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(st.sampled_from(sorted(good["model"])), _JSON)
    def check(name, value):
        (run / "config.json").write_text(json.dumps({"model": good["model"] | {name: value}}))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with contextlib.suppress(*_DOCUMENTED):
            convert(run, tmp_path / "out")

    check()


@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.long)])
def test_any_change_of_a_header(whole, tmp_path, examples):
    file = sorted(whole.glob("*.safetensors"))[0].name
    good = (whole / file).read_bytes()
    size = 8 + struct.unpack("<Q", good[:8])[0]

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(st.integers(0, size - 1), st.binary(min_size=1, max_size=8))
    def check(start, others):
        folder = _copy(whole, tmp_path / "m")
        (folder / file).write_bytes(good[:start] + others + good[start + len(others) :])
        _survives(folder, tmp_path)

    check()


@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.long)])
def test_any_change_of_an_index(whole, tmp_path, examples):
    name = "model.safetensors.index.json"
    good = (whole / name).read_bytes()

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(st.integers(0, len(good) - 1), st.binary(min_size=0, max_size=8), st.integers(0, 8))
    def check(start, others, dropped):
        folder = _copy(whole, tmp_path / "m")
        (folder / name).write_bytes(good[:start] + others + good[start + dropped :])
        _survives(folder, tmp_path)

    check()
