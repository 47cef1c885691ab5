"""Prepared text: what is in it, and that it is made once."""

import errno
import itertools
import os

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moesaic.train.baselines import count_bytes
from moesaic.train.corpus import documents
from moesaic.train.errors import UserError
from moesaic.train.prepare import prepare
from tests.train.conftest import write_corpus


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moesaic"


def _prepare(folder, **changes):
    notes = []
    text = prepare(
        str(folder), **{"text_column": "text", "tokenizer": None, "vocab_size": 300, **changes}, notify=notes.append
    )
    return text, len(notes)


def test_tokens_are_the_training_documents_between_ends(corpus, own_cache):
    text, _ = _prepare(corpus)
    tokens = text.tokens()
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    ends = np.flatnonzero(tokens == text.eos_id)
    assert ends[0] == 0
    assert ends[-1] == len(tokens) - 1
    tokenizer = text.tokenizer()
    found = [tokenizer.decode(tokens[start + 1 : end]) for start, end in itertools.pairwise(ends)]
    everything = documents(str(corpus))
    assert found == [document.text for document in everything if not document.held_out]
    assert text.train_documents == len(found)
    assert text.train_bytes == sum(len(part.encode()) for part in found)
    assert (text.byte_counts() == count_bytes(found)).all()
    assert {document.key for document in text.held_out()} == {d.key for d in everything if d.held_out}


def test_the_same_text_is_prepared_once(corpus, own_cache):
    first, notes = _prepare(corpus)
    assert notes == 1
    second, notes = _prepare(corpus)
    assert notes == 0
    assert second == first
    assert [path.name for path in own_cache.iterdir()] == [first.folder.name]


def test_other_text_or_another_vocabulary_is_prepared_anew(corpus, own_cache, tmp_path):
    first, _ = _prepare(corpus)
    other, notes = _prepare(write_corpus(tmp_path / "other", documents=61))
    assert notes == 1
    assert other.data_identity != first.data_identity
    smaller, notes = _prepare(corpus, vocab_size=290)
    assert notes == 1
    assert smaller.data_identity == first.data_identity
    assert smaller.tokenizer_identity != first.tokenizer_identity


def test_a_given_tokenizer_is_used(corpus, own_cache):
    first, _ = _prepare(corpus)
    given, notes = _prepare(corpus, tokenizer=str(first.folder / "tokenizer"))
    assert notes == 1
    assert given.tokenizer_identity == first.tokenizer_identity
    assert (given.tokens() == first.tokens()).all()


def test_an_interrupted_preparation_leaves_nothing(corpus, own_cache, monkeypatch):
    def interrupted(texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.train.prepare.count_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _prepare(corpus)
    assert list(own_cache.iterdir()) == []
    assert _prepare(corpus)[1] == 1


@pytest.mark.parametrize(
    "name", ["train.npy", "held_out.json", "byte_counts.npy", "meta.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_a_damaged_cache_is_made_again(corpus, own_cache, name, damage):
    first, _ = _prepare(corpus)
    tokens, file = first.tokens().copy(), first.folder / name
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "lost":
        file.unlink()
    else:
        changed = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        file.write_bytes(changed if damage == "flip" else content[:middle])
    notes = []
    again = prepare(str(corpus), text_column="text", tokenizer=None, vocab_size=300, notify=notes.append)
    assert notes[0].startswith(f"the cache {first.folder} is damaged (")
    assert (again.tokens() == tokens).all()
    assert file.read_bytes() == content
    assert [path.name for path in own_cache.iterdir()] == [first.folder.name]


def test_a_full_disk_under_the_cache_is_an_error_with_a_remedy(corpus, own_cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write the cache .*No space left.* set XDG_CACHE_HOME"):
        _prepare(corpus)
    assert list(own_cache.iterdir()) == []


def test_two_at_a_time_agree(corpus, own_cache):
    def meanwhile(note):
        inner.append(_prepare(corpus)[0])

    inner = []
    outer = prepare(str(corpus), text_column="text", tokenizer=None, vocab_size=300, notify=meanwhile)
    assert [outer] == inner
    assert [path.name for path in own_cache.iterdir()] == [outer.folder.name]


def test_ids_with_gaps_do_not_wrap(corpus, own_cache, tmp_path):
    words = {"</s>": 0, "[UNK]": 70_000}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    text, _ = _prepare(corpus, tokenizer=str(tmp_path / "tokenizer"))
    assert set(np.unique(text.tokens())) == {0, 70_000}
