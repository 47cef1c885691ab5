"""Byte models without parameters to train: what a language model has to beat.

Both are fitted to the training text and measured in bits per byte, on whole documents. They get to know where a
document begins, and do not have to predict where it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

# Row of the counts for the first byte of a document, which follows none.
_START = 256


def count_bytes(texts: Iterable[str]) -> np.ndarray:
    """Counts `[257, 256]`: `[a, b]` tells how often byte b follows byte a, and `[256, b]` how often b begins a text."""
    counts = np.zeros(257 * 256, np.int64)
    for text in texts:
        previous, following = _pairs(text)
        counts += np.bincount(previous * 256 + following, minlength=257 * 256)
    return counts.reshape(257, 256)


def unigram_bits(counts: np.ndarray, texts: Sequence[str]) -> float:
    """Bits per byte of `texts` where byte b has probability `(n_b + 1) / (n + 256)`."""
    probability = _unigram(counts)
    bits = sum(-np.log2(probability[_pairs(text)[1]]).sum() for text in texts)
    return float(bits) / _size(texts)


def bigram_bits(counts: np.ndarray, texts: Sequence[str]) -> float:
    """Bits per byte of `texts` where byte b follows a with Witten-Bell smoothed probability.

    `(n_ab + t_a u_b) / (n_a + t_a)`, with `t_a` the number of different bytes seen after a (1 if none was) and `u` the
    unigram model.
    """
    kinds = np.maximum((counts > 0).sum(1, keepdims=True), 1)
    probability = (counts + kinds * _unigram(counts)) / (counts.sum(1, keepdims=True) + kinds)
    bits = sum(-np.log2(probability[_pairs(text)]).sum() for text in texts)
    return float(bits) / _size(texts)


def _unigram(counts: np.ndarray) -> np.ndarray:
    single = counts.sum(0)
    return (single + 1) / (single.sum() + 256)


def _pairs(text: str) -> tuple[np.ndarray, np.ndarray]:
    following = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return np.concatenate([[_START], following[:-1]])[: len(following)], following


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)
