"""Byte models against numbers worked out by hand."""

from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.train.baselines import bigram_bits, count_bytes, unigram_bits

A, B = ord("a"), ord("b")


def test_counts():
    counts = count_bytes(["ab", "aab", ""])
    assert counts.shape == (257, 256)
    assert (counts[256, A], counts[A, B], counts[A, A]) == (2, 2, 1)
    assert counts.sum() == 5


def test_unigram_by_hand():
    # "aab": a twice, b once; add-one over 256 bytes.
    counts = count_bytes(["aab"])
    assert unigram_bits(counts, ["ab"]) == pytest.approx((-log2(3 / 259) - log2(2 / 259)) / 2)


def test_bigram_by_hand():
    counts = count_bytes(["aab"])
    u_a, u_b, u_c = 3 / 259, 2 / 259, 1 / 259
    start_a = (1 + 1 * u_a) / (1 + 1)  # one document, one kind of first byte
    a_b = (1 + 2 * u_b) / (2 + 2)  # a went to a and to b, once each
    b_c = (0 + 1 * u_c) / (0 + 1)  # nothing ever followed b
    expected = (-log2(start_a) - log2(a_b) - log2(b_c)) / 3
    assert bigram_bits(counts, ["abc"]) == pytest.approx(expected)


@settings(max_examples=20)
@given(st.lists(st.text(max_size=30), max_size=4), st.sampled_from([unigram_bits, bigram_bits]), st.binary(max_size=3))
def test_probabilities_of_all_continuations_sum_to_one(texts, bits, start):
    counts = count_bytes(texts)
    start = start.decode("ascii", "ignore")
    # Bytes past 127 are no text by themselves: their share is what is left.
    total = sum(
        2
        ** -(
            bits(counts, [start + chr(byte)]) * (len(start) + 1) - (bits(counts, [start]) * len(start) if start else 0)
        )
        for byte in range(128)
    )
    assert 0 < total <= 1 + 1e-9
    if not any(ord(character) > 127 for text in texts for character in text) and any(texts):
        assert total > 128 / 256 - 1e-9


def test_text_it_was_fitted_to_is_easier():
    text = "the cat and the dog and the cat " * 50
    counts = count_bytes([text])
    assert bigram_bits(counts, [text]) < unigram_bits(counts, [text]) < 8
