"""A corpus made ready to train on, and cached: tokenizer, token array, held-out text, byte counts.

The cache is in `$XDG_CACHE_HOME/moesaic` (`~/.cache/moesaic`), one folder for each combination of text and tokenizer,
named by their hash. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.train import tokenizer as tokenizers
from moesaic.train.baselines import count_bytes
from moesaic.train.corpus import Document, documents, fingerprint
from moesaic.train.errors import UserError

# Counts up when what is in a folder changes.
_FORMAT = 1
# Of a large corpus this much held-out text is kept: more than anyone measures.
_HELD_OUT_BYTES = 32 * 2**20


@dataclass(frozen=True)
class PreparedText:
    """A folder of the cache."""

    folder: Path
    data_identity: str
    """Hash of all the text, what is held out included."""
    tokenizer_identity: str
    """Hash of everything that decides which tokens a text becomes."""
    vocab_size: int
    eos_id: int
    train_bytes: int
    train_documents: int

    def tokens(self) -> np.ndarray:
        """All training tokens, an end-of-text token before each document and after the last; mapped, not read."""
        return np.load(self.folder / "train.npy", mmap_mode="r")

    def byte_counts(self) -> np.ndarray:
        """`count_bytes` of the training text."""
        return np.load(self.folder / "byte_counts.npy")

    def held_out(self) -> list[Document]:
        """Documents that are never trained on, in a fixed order that has nothing to do with their content."""
        rows = json.loads((self.folder / "held_out.json").read_text())
        return [Document(**row) for row in rows]

    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return tokenizers.load(self.folder / "tokenizer")


def prepare(
    data: str,
    *,
    text_column: str,
    tokenizer: str | None,
    vocab_size: int,
    notify: Callable[[str], None] = lambda text: None,
) -> PreparedText:
    """The prepared text of `data`, from the cache if it is there. Reads the whole corpus either way.

    Processes that do this at the same time all do the work, and all get the same result. `notify` is told before
    anything that takes long.
    """
    corpus = documents(data, text_column)
    given = None if tokenizer is None else tokenizers.load(tokenizer)
    recipe = tokenizers.bpe_recipe(vocab_size) if given is None else tokenizers.identity(given)
    data_identity = fingerprint(corpus)
    key = hashlib.sha256(f"{_FORMAT}\n{data_identity}\n{recipe}".encode()).hexdigest()
    folder = cache_folder() / f"text-{key[:20]}"
    if not (folder / "meta.json").is_file():
        what = "training a tokenizer on it and encoding it" if given is None else "encoding it"
        notify(f"new text, {len(corpus)} documents: {what}; the result is cached in {folder}")
        _build(folder, corpus, data_identity, given, vocab_size)
    return open_prepared(folder)


def open_prepared(folder: Path) -> PreparedText:
    """The prepared text in a folder that `prepare` has made."""
    return PreparedText(folder=folder, **json.loads((folder / "meta.json").read_text()))


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/moesaic`, or `~/.cache/moesaic`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moesaic"


def _build(folder: Path, corpus: Sequence[Document], data_identity: str, given: Any | None, vocab_size: int) -> None:
    train = [document.text for document in corpus if not document.held_out]
    tokenizer = tokenizers.train_bpe(train, vocab_size) if given is None else given
    tokens = _join(tokenizer, train)
    meta = {
        "data_identity": data_identity,
        "tokenizer_identity": tokenizers.identity(tokenizer),
        "vocab_size": len(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "train_bytes": sum(len(text.encode()) for text in train),
        "train_documents": len(train),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder.parent} ({error}); set XDG_CACHE_HOME to a folder that can be written to"
        ) from error
    try:
        tokenizer.save_pretrained(work / "tokenizer")
        np.save(work / "train.npy", tokens)
        np.save(work / "byte_counts.npy", count_bytes(train))
        (work / "held_out.json").write_text(json.dumps(_held_out(corpus)))
        (work / "meta.json").write_text(json.dumps(meta))
        try:
            work.rename(folder)
        except OSError:
            # Somebody else was faster; anything but a complete folder in this place would be a real error.
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _join(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = np.array([tokenizer.eos_token_id], dtype)
    parts = [end]
    for ids in tokenizers.encode(tokenizer, texts):
        parts += [np.asarray(ids, dtype), end]
    return np.concatenate(parts)


def _held_out(corpus: Sequence[Document]) -> list[dict[str, str]]:
    chosen = [document for document in corpus if document.held_out]
    chosen.sort(key=lambda document: hashlib.sha256(document.key.encode()).digest())
    rows, size = [], 0
    for document in chosen:
        if size >= _HELD_OUT_BYTES:
            break
        rows.append({"key": document.key, "text": document.text})
        size += len(document.text.encode())
    return rows
