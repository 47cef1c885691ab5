"""Settings from files and from data: what a file may say, what wins, and lengths and warm-ups that fit."""

import dataclasses
import json

import numpy as np
import pytest

from moesaic.cli import main
from moesaic.train.command import parse
from moesaic.train.config import TrainConfig, to_json, with_defaults
from moesaic.train.fit import fit_seq_len
from moesaic.train.packing import Conversations, PackedRows
from moesaic.train.prepared import PreparedConversations, PreparedText
from moesaic.train.settings_file import arguments_in

YAML = """
# A comment.
steps: 7
lr: 1e-3
batch-size: 32
betas: [0.8, 0.9]
packing: false
tensorboard: true
prompt: --help me
text_column: null
"""
TOML = """
steps = 7
lr = 1e-3
batch-size = 32
betas = [0.8, 0.9]
packing = false
tensorboard = true
prompt = "--help me"
"""
EXPECTED = TrainConfig(steps=7, lr=1e-3, batch_size=32, betas=(0.8, 0.9), packing=False, prompt="--help me")


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.YML", YAML), ("run.toml", TOML)])
def test_files_say_the_same_as_flags_and_flags_override_them(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    expected = dataclasses.replace(EXPECTED, config=file)
    assert parse(["--config", str(file)], leader=True) == expected
    found = parse(["--steps", "9", f"--config={file}", "--packing", "--betas", "0.1", "0.2"], leader=True)
    assert found == dataclasses.replace(expected, steps=9, packing=True, betas=(0.1, 0.2))


def test_the_settings_of_a_run_are_a_file_too(tmp_path):
    settings = dataclasses.replace(EXPECTED, out=tmp_path / "before", dp_shard=2, aux_loss="pooled")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"settings": to_json(settings), "world_size": 4}))
    # But for the folder, in which that run is.
    expected = dataclasses.replace(settings, out=None, config=file)
    assert parse(["--config", str(file)], leader=True) == expected


def test_with_resume_a_file_overrides_the_settings_of_the_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"settings": to_json(TrainConfig(steps=7, lr=0.5, seed=3))}))
    manifest = tmp_path / "checkpoints" / "step-00000007" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    file = tmp_path / "more.toml"
    file.write_text("steps = 20\nlr = 0.25\n")
    found = parse(["--resume", "--out", str(tmp_path), "--config", str(file), "--lr", "0.125"], leader=True)
    assert (found.steps, found.lr, found.seed, found.resume) == (20, 0.125, 3, True)


def test_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert arguments_in(tmp_path / "empty.yaml") == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "stepss: 3", "there is no setting 'stepss'; did you mean steps?"),
        ("a.yaml", "zzz: 3", "there is no setting 'zzz'; moesaic train --help lists all"),
        ("a.yaml", "steps: many", "steps cannot be 'many'; moesaic train --help says what --steps takes"),
        ("a.toml", "packing = 'yes'", "packing cannot be 'yes'"),
        ("a.toml", "steps = true", "steps cannot be True"),
        ("a.toml", "betas = [0.5]", "betas cannot be [0.5]"),
        ("a.toml", "[model]\nlr = 1", "model must be a value and not a section"),
        ("a.toml", "resume = true", "resume is for the command line: give --resume there"),
        ("a.toml", "config = 'b.toml'", "config is for the command line"),
        ("a.yaml", "- steps", "expected names and values, such as seq_len: 256, got list"),
        ("a.yaml", "steps: [", "cannot be read: "),
        ("a.toml", "steps =", "cannot be read: "),
        ("a.json", "{", "cannot be read: "),
        ("a.txt", "steps: 3", "the name must end in .yaml, .toml or .json"),
        ("nowhere/a.yaml", None, "No such file or directory"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, capsys, name, text, message):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    assert main(["train", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"moesaic train: --config {file}" in err
    assert message in err


def test_values_of_a_file_are_checked_like_flags(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("steps = 0\n")
    assert main(["train", "--config", str(tmp_path / "a.toml")]) == 2
    assert "--steps must be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "expected"), [(160, 20), (10_000, 20), (60, 7), (8, 1), (3, 0), (1, 0)])
def test_the_warm_up_fits_the_run(steps, expected):
    config = with_defaults(TrainConfig(steps=steps), pretrained=False, own_aux_loss_coef=None)
    assert config.warmup_steps == expected
    given = with_defaults(TrainConfig(steps=steps, warmup_steps=50), pretrained=False, own_aux_loss_coef=None)
    assert given.warmup_steps == 50


def _conversations(*lengths):
    """Conversations of so many tokens, of which the second half is learned."""
    counted = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    return Conversations(np.zeros(sum(lengths), np.uint16), counted, np.cumsum(lengths))


class _Chats(PreparedConversations):
    def __init__(self, train, held_out):
        object.__setattr__(self, "parts", (train, held_out))

    def train(self):
        return self.parts[0]

    def held_out(self):
        return self.parts[1]


class _Text(PreparedText):
    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("seq_len", "lengths", "positions", "expected", "told"),
    [
        (None, (20, 50), 256, 64, "--seq-len 64: the longest conversation has 49 tokens"),
        (None, (20, 49), 256, 48, "has 48 tokens"),
        (None, (20, 500), 256, 256, "has 499 tokens"),
        (None, (20, 50_000), 10**6, 4096, "has 49999 tokens"),
        (None, (20, 50), None, 64, "has 49 tokens"),
        (512, (20, 50), 256, 512, None),
        (512, (20, 400), 256, 512, "warning: --seq-len 512: conversations of 399 tokens pass the 256 positions"),
        (None, None, 2048, 128, None),
        (None, None, 64, 64, None),
        (512, None, 256, 512, "warning: --seq-len 512: sequences of 512 tokens pass the 256 positions"),
        (512, None, "many", 512, None),
    ],
)
def test_rows_fit_data_and_model(seq_len, lengths, positions, expected, told):
    text = _Text() if lengths is None else _Chats(_conversations(10, 12), _conversations(*lengths))
    notes = []
    assert fit_seq_len(TrainConfig(seq_len=seq_len), text, positions, notes.append).seq_len == expected
    assert (told is None and notes == []) or told in notes[-1]


def test_what_is_lost_where_conversations_are_cut():
    # Learned are the targets 10 to 19, 20 to 39 and 2 to 3.
    rows = PackedRows(_conversations(20, 40, 4), 25, packed=False, pad_id=0)
    assert (rows.cut, rows.shortened, rows.left_out) == (1, 1, 0)
    assert rows.describe_cut("--seq-len 25") == (
        "1 of 3 conversations are longer than --seq-len 25; they are cut, and 1 of them lose tokens to learn"
    )
    rows = PackedRows(_conversations(20, 40), 15, packed=False, pad_id=0)
    assert (rows.cut, rows.shortened, rows.left_out) == (2, 2, 1)
    # Only what is not learned is cut.
    first = _conversations(8)
    rows = PackedRows(first._replace(counted=np.arange(8) < 4), 5, packed=False, pad_id=0)
    assert (rows.cut, rows.shortened) == (1, 0)
    assert rows.describe_cut("x") == "1 of 1 conversations are longer than x; they are cut"
