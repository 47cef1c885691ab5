"""Flipped bits in each kind of file that has a hash: every one is found."""

import random

import pytest

from moesaic import checkpoint
from moesaic.checkpoint import CheckpointError
from moesaic.train.prepare import prepare
from tests.checkpoint.test_store import _state


def _accepted(file, check, flips, seed):
    """How many of the flipped bits `check` does not see."""
    good, chance, accepted = file.read_bytes(), random.Random(seed), 0
    for _ in range(flips):
        position = chance.randrange(len(good) * 8)
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        file.write_bytes(bad)
        accepted += check()
    file.write_bytes(good)
    assert check()
    return accepted


@pytest.mark.parametrize("flips", [10, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_of_a_checkpoint(tmp_path, name, flips):
    path = checkpoint.save(tmp_path, 1, _state(1), {"sample": 32})

    def check():
        said = None
        try:
            checkpoint.store.verify(path)
        except CheckpointError as error:
            said = str(error)
        assert said is None or name in said
        return said is None

    assert _accepted(path / name, check, flips, name) == 0


@pytest.mark.parametrize("flips", [3, pytest.param(300, marks=pytest.mark.long)])
def test_of_a_cache(tmp_path, monkeypatch, flips):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.txt").write_text(f"{index} some words of a text\n" * 5)
    told = []

    def open_it():
        told.clear()
        return prepare(str(folder), text_column=None, tokenizer=None, vocab_size=270, notify=told.append)

    place = open_it().folder
    good = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}

    def check():
        open_it()
        return not any("is damaged" in text for text in told)

    for path in good:
        assert _accepted(path, check, flips, path.name) == 0
