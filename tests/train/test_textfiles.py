"""Which files are read as text, and what is said of the others."""

import bz2
import gzip
import lzma
import os

import pytest

from moesaic.train.corpus import documents
from moesaic.train.errors import UserError
from moesaic.train.textfiles import UnreadableError, read_lines, read_text

TEXT = "Grüße, 世界\nund mehr\n"
LATIN = "Grüße\n"
READ = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": TEXT.encode("utf-8-sig"),
    "utf-16, little end first": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "utf-16, big end first": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "gzip": gzip.compress(TEXT.encode()),
    "gzip of utf-16": gzip.compress(TEXT.encode("utf-16")),
    "bzip2": bz2.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
}
DECLARED = {
    "python": "#!/bin/python\n# -*- coding: latin-1 -*-\n",
    "xml": '<?xml version="1.0" encoding="ISO-8859-1"?>\n',
    "html": "<html><head><META charset='iso-8859-1'>\n",
}
UNREAD = {
    "binary": (b"\x89PNG\0\0", "binary"),
    "marked binary": (b"\xff\xfe\0\0\0", "utf-32"),
    "latin-1": (LATIN.encode("latin-1"), "not UTF-8; if it is text, convert it"),
    "declared wrongly": (b"# coding: ascii\n\xe9", "declared as ascii, but not that"),
    "declared as no text": (b"# coding: rot13\n\xe9", "declared as rot13, but not that"),
    "cut gzip": (gzip.compress(os.urandom(999))[:500], "its compressed data are broken"),
    "broken gzip": (b"\x1f\x8b\x08" + b"x" * 99, "its compressed data are broken|Unknown|CRC"),
    "gzip of binary": (gzip.compress(b"\0"), "binary"),
    "zip": (b"PK\x03\x04", "packed as zip; unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd", "packed as zstd; unpack it"),
}


@pytest.mark.parametrize("data", READ.values(), ids=READ)
def test_what_says_how_it_is_written_is_read(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    assert read_text(tmp_path / "file") == TEXT
    assert list(read_lines(tmp_path / "file")) == TEXT.splitlines(keepends=True)


@pytest.mark.parametrize("head", DECLARED.values(), ids=DECLARED)
def test_a_declared_encoding_is_taken_where_it_is_not_utf_8(tmp_path, head):
    (tmp_path / "file").write_bytes((head + LATIN).encode("latin-1"))
    assert read_text(tmp_path / "file") == head + LATIN
    (tmp_path / "file").write_bytes((head + TEXT).encode())
    assert read_text(tmp_path / "file") == head + TEXT


@pytest.mark.parametrize(("data", "reason"), UNREAD.values(), ids=UNREAD)
def test_what_does_not_say_is_not_guessed_at(tmp_path, data, reason):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UnreadableError, match=reason):
        read_text(tmp_path / "file")


@pytest.fixture
def strange(tmp_path):
    """A folder with two texts, and what could hang a reader or be left out in silence; the reasons by name."""
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "one.txt").write_text("one\n")
    (folder / "two.txt").write_text("two\n")
    os.mkfifo(folder / "pipe")
    reasons = {"pipe": "a named pipe, not a file"}
    for name, target, reason in [
        ("device", "/dev/zero", "a device, not a file"),
        ("loop", ".", "a link to a folder"),
        ("itself", "itself", "Too many levels of symbolic links"),
        ("broken", "nowhere", "No such file or directory"),
    ]:
        (folder / name).symlink_to(target)
        reasons[name] = reason
    return folder, reasons


@pytest.mark.timeout(60)
def test_what_is_left_out_is_counted_and_named(strange):
    folder, reasons = strange
    (folder / "again.txt").symlink_to("one.txt")
    notes = []
    corpus = documents(str(folder), notify=notes.append)
    assert sorted(document.text for document in corpus) == ["one\n", "two\n"]
    (note,) = notes
    assert note.startswith(f"--data {folder}: left out 5 of 8 files: ")
    assert all(f"{name} ({reason})" in note for name, reason in reasons.items())
    for number in range(3):
        (folder / f"more{number}").write_bytes(b"\0")
    documents(str(folder), notify=notes.append)
    assert notes[-1].endswith(", and 3 more")


@pytest.mark.timeout(60)
def test_each_of_them_alone_is_an_error(strange):
    folder, reasons = strange
    for name in reasons.keys() - {"loop", "broken"}:
        with pytest.raises(UserError) as error:
            documents(str(folder / name))
        assert str(error.value).startswith(f"--data {folder / name}")
        assert reasons[name] in str(error.value)


def test_names_that_are_not_utf_8(tmp_path):
    for name, data in [(b"caf\xe9.txt", b"one\n"), (b"th\xe9.bin", b"\0"), (b"b.txt", b"two\n")]:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(data)
    notes = []
    corpus = documents(str(tmp_path), notify=notes.append)
    assert [document.text for document in corpus] == ["two\n", "one\n"]
    assert notes == [f"--data {tmp_path}: left out 1 of 3 files: th\\udce9.bin (binary)"]
    with pytest.raises(UserError, match=r"th\\udce9.bin cannot be read as text: binary"):
        documents(str(tmp_path / os.fsdecode(b"th\xe9.bin")))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    notes = []
    documents(str(tmp_path), notify=notes.append)
    assert notes == [f"--data {tmp_path}: left out 1 of 3 files: closed (Permission denied)"]


def test_rows_among_texts_are_pointed_out(tmp_path):
    (tmp_path / "README").write_text("about\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    notes = []
    documents(str(tmp_path), notify=notes.append)
    assert len(notes) == 1
    assert "1 of 2 files are named like rows and read as plain text: rows.jsonl" in notes[0]
