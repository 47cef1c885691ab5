"""Which folders count as checkpoints, and what a damaged one says."""

import hashlib
import itertools
import json

import pytest

from moesaic.checkpoint import CheckpointError, Manifest, checkpoints, exchange, latest, read_manifest
from moesaic.checkpoint import folder as folders
from moesaic.checkpoint.sealed import describe_file


def _make(root, step, *, files=None, name=None):
    path = root / (name or folders.folder_name(step))
    path.mkdir(parents=True)
    folders.write_manifest(path, Manifest(step=step, world_size=1, info={}, files=files or {}))
    return path


def test_only_complete_folders_count(tmp_path):
    one, two = _make(tmp_path, 1), _make(tmp_path, 200_000_000)
    _make(tmp_path, 300, name="step-00000300.tmp")
    _make(tmp_path, 400, name="step-00000400.old")
    (tmp_path / "step-00000500").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints(tmp_path) == [one, two]
    assert latest(tmp_path) == two
    assert latest(tmp_path / "absent") is None


def test_prune_keeps_the_newest_and_removes_what_crashes_left(tmp_path):
    for step in (10, 20, 30, 40):
        _make(tmp_path, step)
    _make(tmp_path, 25, name="step-00000025.tmp")
    (tmp_path / "notes.tmp").mkdir()
    folders.prune(tmp_path, keep=2, newest=30)
    # A checkpoint of a later step is not this save's to remove.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.tmp",
        "step-00000020",
        "step-00000030",
        "step-00000040",
    ]


def test_a_folder_being_removed_does_not_count(tmp_path, monkeypatch):
    path = _make(tmp_path, 10)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    folders.remove(path)
    assert checkpoints(tmp_path) == []


def _rewrite(path, change):
    """A manifest with other values, and the hash that goes with them."""
    values = json.loads((path / "manifest.json").read_text()) | change
    text = json.dumps(values | {"sha256": "0" * 64})
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(text.replace("0" * 64, digest))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"step": 11},
        {"step": "10"},
        {"files": {"../outside": {"bytes": 1, "sha256": "0"}}},
        {"files": {"..": {"bytes": 1, "sha256": "0"}}},
        {"files": {"sub\\outside": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}},
        {"files": {"data": {"bytes": 1}}},
        {"files": ["data"]},
        {"info": None},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change):
    path = _make(tmp_path, 10)
    _rewrite(path, {})
    read_manifest(path)
    _rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"step-00000010.manifest\.json"):
        read_manifest(path)


def test_every_bit_of_a_manifest_counts(tmp_path):
    files = {"data": {"bytes": 7, "sha256": "ab" * 32}}
    file = _make(tmp_path, 10, files=files) / "manifest.json"
    good = file.read_bytes()
    for position, bit in itertools.product(range(len(good)), range(8)):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json (is damaged|has format)"):
            read_manifest(file.parent)


def test_a_manifest_of_the_first_format_is_read(tmp_path):
    path = tmp_path / "step-00000010"
    path.mkdir()
    values = {"step": 10, "world_size": 2, "info": {"a": 1}, "files": {}, "format": 1}
    (path / "manifest.json").write_text(json.dumps(values))
    assert read_manifest(path) == Manifest(**values)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}'])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, text):
    path = _make(tmp_path, 10)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(path)


def test_files_are_checked_by_size_and_content(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(b"abc" * 1000)
    entry = describe_file(file)
    folders.verify_file(file, entry)
    file.write_bytes(b"abc" * 999 + b"abd")
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        folders.verify_file(file, entry)
    file.write_bytes(b"abc" * 999)
    with pytest.raises(CheckpointError, match="has 2997 bytes, not 3000"):
        folders.verify_file(file, entry)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        folders.verify_file(file, entry)


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "notes").write_text("before")
    with pytest.raises(FileNotFoundError):
        exchange.publish(tmp_path / "missing", tmp_path / "final")
    assert (tmp_path / "final" / "notes").read_text() == "before"
