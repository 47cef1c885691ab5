"""Which text is trained on and which is held out."""

import json
import sys

import pytest

from moesaic.train.corpus import Document, documents, fingerprint, split
from moesaic.train.errors import UserError
from tests.train.conftest import write_corpus


def _split(corpus):
    train = {document.text for document in corpus if not document.held_out}
    held_out = {document.text for document in corpus if document.held_out}
    return train, held_out


def test_train_and_held_out_text_never_overlap(tmp_path):
    folder = write_corpus(tmp_path / "text", documents=200)
    # Copies under other names, some of which would fall on the other side.
    for path in sorted(folder.glob("*.txt")):
        (folder / f"copy of {path.name}").write_text(path.read_text())
    corpus = documents(str(folder))
    train, held_out = _split(corpus)
    assert len(corpus) == 200
    assert train
    assert held_out
    assert not train & held_out


def test_the_standard_library_is_a_corpus():
    corpus = documents("stdlib")
    train, held_out = _split(corpus)
    assert not train & held_out
    size = sum(map(len, train))
    assert size > 2_000_000
    assert 0.01 < sum(map(len, held_out)) / size < 0.15
    keys = [document.key for document in corpus]
    assert "dataclasses.py" in keys
    assert keys == sorted(keys)
    assert not [key for key in keys if {"test", "tests", "site-packages"} & set(key.split("/"))]


def test_a_document_stays_on_its_side_when_others_come(tmp_path):
    small = documents(str(write_corpus(tmp_path / "small", documents=50)))
    large = {document.key: document for document in documents(str(write_corpus(tmp_path / "large", documents=90)))}
    assert all(large[document.key].held_out == document.held_out for document in small)


def test_about_a_twentieth_is_held_out():
    count = sum(Document(f"{index}.py", "").held_out for index in range(10_000))
    assert 400 < count < 600


def test_what_is_not_text_is_left_out(tmp_path):
    folder = write_corpus(tmp_path / "text")
    before = fingerprint(documents(str(folder)))
    (folder / "picture").write_bytes(b"\x89PNG\0\0")
    (folder / "latin1.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]")
    assert fingerprint(documents(str(folder))) == before
    (folder / "more.txt").write_text("more")
    assert fingerprint(documents(str(folder))) != before


def test_the_fingerprint_knows_names_and_texts_apart():
    one, two = Document("a", "bc"), Document("ab", "c")
    assert len({fingerprint([one]), fingerprint([two]), fingerprint([one, two]), fingerprint([two, one])}) == 4


def test_one_file_is_cut_into_pieces(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {index} of the book\n" for index in range(60_000)))
    corpus = documents(str(path))
    assert "".join(document.text for document in corpus) == path.read_text()
    train, held_out = _split(corpus)
    assert train
    assert held_out


@pytest.mark.parametrize("count", [2, 3, 10, 39, 45])
@pytest.mark.parametrize("names", ["{}.txt", "{}.md", "chapter {}"])
def test_of_few_files_some_are_held_out_whatever_their_names(tmp_path, count, names):
    for index in range(count):
        (tmp_path / names.format(index)).write_text(f"the text of file {index}\n" * 20)
    corpus = documents(str(tmp_path))
    train, held_out = split(corpus)
    assert len(corpus) == count == len(train) + len(held_out)
    assert train
    assert held_out
    assert not {document.text for document in train} & {document.text for document in held_out}


def test_some_are_trained_on_where_all_would_be_held_out():
    corpus = [document for index in range(200) if (document := Document(f"{index}", f"{index}")).held_out]
    assert len(corpus) > 1
    train, held_out = split(corpus)
    assert len(train) == 1
    assert {document.key for document in corpus} == {document.key for document in train + held_out}


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "x" * 20_000 + "y" * 20_000, "".join(f"line {index}\n" for index in range(99)), "one\ntwo\n"],
    ids=["one line", "two pieces", "less than a piece", "two lines"],
)
def test_one_file_is_enough(tmp_path, text):
    (tmp_path / "file").write_text(text)
    train, held_out = split(documents(str(tmp_path / "file")))
    assert train
    assert held_out
    assert not {document.text for document in train} & {document.text for document in held_out}


def test_pieces_that_repeat_do_not_overlap_either(tmp_path):
    path = tmp_path / "book.txt"
    chapter = "".join(f"line {index:06}\n" for index in range(16_384 // 12 + 1))
    unique = "".join(f"row {index} is like no other\n" for index in range(60_000))
    path.write_text(chapter * 50 + unique)
    train, held_out = _split(documents(str(path)))
    assert not train & held_out


def test_parquet_with_conversations(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    call = {"function": {"name": "f", "arguments": "{}"}}
    rows = [
        [{"role": "user", "content": f"{index}"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        for index in range(3)
    ]
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict({"messages": rows}).to_parquet(str(tmp_path / "rows" / "one.parquet"))
    for path in (tmp_path / "rows", tmp_path / "rows" / "one.parquet"):
        found = [json.loads(document.text)["messages"] for document in documents(str(path))]
        assert [messages[0]["content"] for messages in found] == ["0", "1", "2"]
        assert found[0][1]["tool_calls"] == [call]


@pytest.mark.parametrize("form", ["jsonl", "disk", "disk with splits"])
def test_datasets(tmp_path, form, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"row {index}" for index in range(100)]
    rows = datasets.Dataset.from_dict({"body": texts, "n": list(range(100))})
    if form == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    else:
        path = tmp_path / "saved"
        (datasets.DatasetDict({"train": rows}) if "splits" in form else rows).save_to_disk(str(path))
    assert [document.text for document in documents(str(path), "body")] == texts
    with pytest.raises(
        UserError, match=r"no column 'messages', 'text', .*or 'instruction' and 'output'.*--text-column: body"
    ):
        documents(str(path))


def test_without_the_datasets_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install '\.\[datasets\]'"):
        documents("someone/some-texts")


def test_errors_name_the_data(tmp_path):
    with pytest.raises(UserError, match="--data is empty"):
        documents("")
    with pytest.raises(UserError, match=r"--data /no/such/place: there is no such file or folder"):
        documents("/no/such/place")
    (tmp_path / "one.txt").write_text("one line\n")
    with pytest.raises(UserError, match="too few"):
        documents(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\0")
    with pytest.raises(UserError, match="binary cannot be read as text: binary"):
        documents(str(tmp_path / "binary"))
