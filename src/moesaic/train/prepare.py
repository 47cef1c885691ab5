"""A corpus made ready to train on, and cached: tokenizer, token array, held-out text, byte counts.

The cache is in `$XDG_CACHE_HOME/moesaic` (`~/.cache/moesaic`), one folder for each combination of text and tokenizer,
named by their hash. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.checkpoint.sealed import flush, open_folder, seal_folder, unseal
from moesaic.train import tokenizer as tokenizers
from moesaic.train.baselines import count_bytes
from moesaic.train.chat import LossOn, Renderer, named_in_template
from moesaic.train.corpus import Conversation, Document, documents, fingerprint, split
from moesaic.train.errors import UserError
from moesaic.train.packing import Conversations
from moesaic.train.prepared import PreparedConversations, PreparedText, save_conversations
from moesaic.train.sets import render_all, token_dtype

# Counts up when what is in a folder changes, or what may be.
_FORMAT = 5
_SEAL = "meta.json"
# Of a large corpus this much held-out text is kept: more than anyone measures.
_HELD_OUT_BYTES = 32 * 2**20


def prepare(
    data: str,
    *,
    text_column: str | None,
    tokenizer: str | None,
    vocab_size: int,
    loss_on: LossOn = "assistant",
    notify: Callable[[str], None] = lambda text: None,
) -> PreparedText | PreparedConversations:
    """The prepared text or conversations of `data`, from the cache if they are there. Reads all of it either way.

    Processes that do this at the same time all do the work, and all get the same result. `notify` is told what
    of the data is left out or looks wrong, and before anything that takes long.
    """
    given = None if tokenizer is None else tokenizers.load(tokenizer)
    corpus = documents(data, text_column, roles=named_in_template(given), notify=notify)
    is_chat = isinstance(corpus[0], Conversation)
    if is_chat and given is None:
        raise UserError(
            f"--data {data} holds conversations: give a pretrained --model, or a --tokenizer with a chat template"
        )
    # What is exported with the model has the template, and of conversations it decides the tokens.
    template = json.dumps(getattr(given, "chat_template", None), sort_keys=True)
    recipe = tokenizers.bpe_recipe(vocab_size) if given is None else f"{tokenizers.identity(given)}\n{template}"
    data_identity = fingerprint(corpus)
    if is_chat:
        data_identity = hashlib.sha256(f"{data_identity}\n{loss_on}\n{template}".encode()).hexdigest()
    key = hashlib.sha256(f"{_FORMAT}\n{data_identity}\n{recipe}".encode()).hexdigest()
    folder = cache_folder() / f"{'chat' if is_chat else 'text'}-{key[:20]}"
    _remove_damaged(folder, notify)
    if not folder.exists():
        what = "training a tokenizer on it and encoding it" if given is None else "encoding it"
        thing = "conversations" if is_chat else "documents"
        notify(f"new text, {len(corpus)} {thing}: {what}; the result is cached in {folder}")
        chosen = given or tokenizers.train_bpe([d.text for d in split(corpus)[0]], vocab_size)
        _build(folder, corpus, data_identity, chosen, loss_on if is_chat else None, notify)
    return open_prepared(folder)


def open_prepared(folder: Path) -> PreparedText | PreparedConversations:
    """What `prepare` has made in a folder."""
    meta = unseal((folder / _SEAL).read_text())
    del meta["files"]
    kind = PreparedConversations if meta.pop("conversations") else PreparedText
    return kind(folder=folder, **meta)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/moesaic`, or `~/.cache/moesaic`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moesaic"


def _remove_damaged(folder: Path, notify: Callable[[str], None]) -> None:
    """Take away a folder whose files are not as they were written. Who still reads it keeps what it has opened."""
    if not folder.exists():
        return
    try:
        open_folder(folder, _SEAL)
    except ValueError as error:
        notify(f"the cache {folder} is damaged ({error}); it is made again")
        with tempfile.TemporaryDirectory(prefix=folder.name, suffix=".old", dir=folder.parent) as aside:
            folder.rename(Path(aside, folder.name))


def _build(
    folder: Path,
    corpus: Sequence[Document],
    data_identity: str,
    tokenizer: Any,
    loss_on: LossOn | None,
    notify: Callable[[str], None],
) -> None:
    train, held_out = split(corpus)
    held_out.sort(key=lambda document: document.digest)
    meta = {
        "conversations": loss_on is not None,
        "data_identity": data_identity,
        "tokenizer_identity": tokenizers.identity(tokenizer),
        "vocab_size": len(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "train_bytes": sum(len(document.text.encode()) for document in train),
        "train_documents": len(train),
    }
    held_out = _beginning(held_out)
    parts: dict[str, Conversations] = {}
    if loss_on is not None:
        renderer = Renderer(tokenizer, loss_on)
        parts = {"train": render_all(renderer, train), "held_out": render_all(renderer, held_out)}
        if renderer.without_tools:
            notify(f"conversations with tools that the chat template does not print: {renderer.without_tools}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder.parent} ({error}); set XDG_CACHE_HOME to a folder that can be written to"
        ) from error
    try:
        tokenizer.save_pretrained(work / "tokenizer")
        if loss_on is not None:
            for name, conversations in parts.items():
                save_conversations(conversations, work, name)
        else:
            texts = [document.text for document in train]
            np.save(work / "train.npy", _join(tokenizer, texts))
            np.save(work / "byte_counts.npy", count_bytes(texts))
        (work / "held_out.json").write_text(json.dumps([dataclasses.asdict(document) for document in held_out]))
        seal_folder(work, _SEAL, meta)
        try:
            work.rename(folder)
        except OSError:
            # Somebody else was faster; anything but a complete folder in this place would be a real error.
            if not (folder / _SEAL).is_file():
                raise
        flush(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder.parent} ({error}); make room, or set XDG_CACHE_HOME to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _join(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    end = np.array([tokenizer.eos_token_id], token_dtype(tokenizer))
    parts = [end]
    for ids in tokenizers.encode(tokenizer, texts):
        parts += [np.asarray(ids, end.dtype), end]
    return np.concatenate(parts)


def _beginning(held_out: Sequence[Document]) -> list[Document]:
    kept, size = [], 0
    for document in held_out:
        if size >= _HELD_OUT_BYTES:
            break
        kept.append(document)
        size += len(document.text.encode())
    return kept
