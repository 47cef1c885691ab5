"""The trained tokenizer loses nothing; a given one is checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.train import tokenizer as tokenizers
from moesaic.train.errors import UserError

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "class A:\n    pass\n" * 20]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe(TEXTS, 280)


@given(st.text(max_size=50))
def test_every_text_comes_back(bpe, text):
    [ids] = tokenizers.encode(bpe, [text])
    # The end of text is a token of its own only where the text spells it out, which real text does not.
    if tokenizers.END_OF_TEXT not in text:
        assert bpe.eos_token_id not in ids
    assert bpe.decode(ids) == text


def test_the_vocabulary_is_as_large_as_asked(bpe):
    assert len(bpe) == 280
    assert bpe.eos_token_id is not None
    [ids] = tokenizers.encode(bpe, TEXTS[:1])
    assert len(ids) < len(TEXTS[0]) / 2


def test_the_same_text_gives_the_same_tokenizer(bpe):
    assert tokenizers.identity(tokenizers.train_bpe(TEXTS, 280)) == tokenizers.identity(bpe)
    assert tokenizers.identity(tokenizers.train_bpe(TEXTS, 270)) != tokenizers.identity(bpe)


def test_a_saved_tokenizer_is_the_same_one(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    again = tokenizers.load(tmp_path)
    assert tokenizers.identity(again) == tokenizers.identity(bpe)
    assert [*tokenizers.encode(again, TEXTS)] == [*tokenizers.encode(bpe, TEXTS)]


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(UserError, match="256 bytes"):
        tokenizers.train_bpe(TEXTS, 256)


def test_errors_name_the_tokenizer(bpe, tmp_path):
    with pytest.raises(UserError, match=f"--tokenizer {tmp_path}"):
        tokenizers.load(tmp_path)
    bpe.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(text.replace('"eos_token"', '"other_token"'))
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenizers.load(tmp_path)
