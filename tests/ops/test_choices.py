"""Tables of choices: what a process goes by, and the file of ``moesaic tune``."""

import json
import threading

import pytest
import torch

from moesaic.ops import fastest, tuned
from moesaic.ops.choices import CASES, CHOSEN, LARGEST, Case, from_json, to_json
from moesaic.ops.processor import Processor, processor

FP32, BF16 = torch.float32, torch.bfloat16
TRAINING = Case("experts_mlp", FP32, "many")
# A processor that no entry fits.
NEW = Processor("Other", False, "avx512", "avx512")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of ``moesaic tune``, on a machine that nobody measured; its kernels are not loaded."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("MOESAIC_TUNED", str(path))
    monkeypatch.setattr(fastest, "processor", lambda: NEW)
    fastest._own.cache_clear()
    yield path
    fastest._own.cache_clear()


def _alternating():
    return {case: CHOSEN[index % 2] for index, case in enumerate(CASES)}


def _keep(path, choices, threads=1):
    tuned.keep(path, tuned.kind_of(NEW, threads), tuned.Tuned(choices, "2026-01-02"))


def test_json_gives_back_the_choices():
    for choices in (_alternating(), dict.fromkeys(CASES, "cpu"), {TRAINING: "torch"}, {}):
        assert from_json(json.loads(json.dumps(to_json(choices)))) == choices
    assert to_json(dict.fromkeys(CASES, "cpu"))["float32"]["experts_mlp"] == "cpu"


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ([], "choices: expected an object"),
        ({"float64": {}}, None),
        ({"float64": {"experts_mlp": "cpu"}}, "'float64' is none of float32, bfloat16"),
        ({"float32": {"experts": "cpu"}}, "'experts' is none of grouped_mm, "),
        ({"float32": {"experts_mlp": {"all": "cpu"}}}, "'all' is none of one, few, some, many"),
        ({"float32": {"experts_mlp": "triton"}}, "'triton' is none of cpu, torch"),
        ({"float32": {"experts_mlp": {"one": ["cpu"]}}}, "is none of cpu, torch"),
        ({"float32": {"experts_mlp": None}}, "experts_mlp: expected an object, got None"),
    ],
)
def test_what_is_no_table_of_choices_is_refused(values, wrong):
    if wrong is None:
        assert from_json(values) == {}
        return
    with pytest.raises(ValueError, match=wrong):
        from_json(values)


def test_the_file_decides_where_nobody_measured(file):
    assert set(fastest.in_force().values()) == {"torch"}
    _keep(file, _alternating(), torch.get_num_threads())
    # What a process goes by is settled when it is first asked for.
    assert set(fastest.in_force().values()) == {"torch"}
    fastest._own.cache_clear()
    assert fastest.in_force() == _alternating()


def test_the_file_is_of_one_kind_of_machine_and_class_of_threads(file):
    _keep(file, _alternating(), threads=2)
    assert tuned.found(NEW, 8).choices == _alternating()
    for machine, threads in ((NEW, 1), (NEW, 9), (NEW._replace(kernels="avx2"), 2), (NEW._replace(kernels="none"), 2)):
        assert tuned.found(machine, threads) is None
    assert [tuned.threads_class(n) for n in (1, 2, 8, 9, 32, 33, 500)] == [
        "1",
        "2-8",
        "2-8",
        "9-32",
        "9-32",
        *["33+"] * 2,
    ]


def test_the_file_goes_before_the_entries(file, monkeypatch):
    known = Processor("AMD", False, "avx512_bf16", "avx512_bf16")
    monkeypatch.setattr(fastest, "processor", lambda: known)
    kind = tuned.kind_of(known, torch.get_num_threads())
    tuned.keep(file, kind, tuned.Tuned({TRAINING: "torch"}, "2026-01-02"))
    in_force = fastest.in_force()
    assert in_force[TRAINING] == "torch"
    assert {name for case, name in in_force.items() if case != TRAINING} == {"cpu"}


def test_choices_that_are_given_replace_those_of_this_process(file):
    call = fastest.Call("experts_mlp", (torch.empty(0),), LARGEST["some"] + 1, 1)
    assert fastest.fastest(call, NEW) == ("torch",)
    fastest.use({TRAINING: "cpu"})
    try:
        assert fastest.fastest(call, NEW) == ("cpu", "torch")
        assert fastest.fastest(call._replace(num_rows=1), NEW) == ("torch",)
    finally:
        fastest.use(None)
    assert fastest.fastest(call, NEW) == ("torch",)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 7, "machines": []}', '{"format": 1}', '{"format": 1, "machines": [{}]}', "\0\0", None]
    + [f'{{"format": 1, "machines": [{{"of": {{{of}}}, "measured": "", "fastest": {{}}}}]}}' for of in ("", '"a": "b"')]
    + ['{"format": 1, "machines": [{"of": [], "measured": "", "fastest": {"float32": {"experts_mlp": "gone"}}}]}'],
)
def test_a_damaged_file_is_named_and_counts_for_nothing(file, text):
    file.parent.mkdir()
    file.mkdir() if text is None else file.write_text(text)
    with pytest.raises(ValueError, match="cannot be used"):
        tuned.read(file)
    with pytest.warns(UserWarning, match=f"{file}, cannot be used: .*`moesaic tune` writes it anew"):
        assert set(fastest.in_force().values()) == {"torch"}
    if text is not None:
        _keep(file, _alternating())
        assert list(tuned.read(file).values()) == [tuned.Tuned(_alternating(), "2026-01-02")]


def test_no_file_is_read_where_none_is_wanted_or_possible(monkeypatch):
    monkeypatch.setenv("MOESAIC_TUNED", "none")
    assert tuned.file() is None
    monkeypatch.setenv("MOESAIC_TUNED", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(tuned.file()) == "/somewhere/moesaic/tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuned.Path, "home", no_home)
    assert tuned.file() is None
    assert tuned.found(processor(), 1) is None


def test_those_who_write_at_the_same_time_keep_each_other(file):
    writers = [threading.Thread(target=_keep, args=(file, {TRAINING: "cpu"}, threads)) for threads in (1, 2, 9, 33)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {kind.threads for kind in tuned.read(file)} == {"1", "2-8", "9-32", "33+"}
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]


def test_forgetting_leaves_the_others(file):
    _keep(file, {TRAINING: "cpu"}, 1)
    _keep(file, {TRAINING: "cpu"}, 2)
    assert tuned.keep(file, tuned.kind_of(NEW, 1), None)
    assert not tuned.keep(file, tuned.kind_of(NEW, 1), None)
    assert [kind.threads for kind in tuned.read(file)] == ["2-8"]
