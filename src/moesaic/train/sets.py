"""Data as rows to measure a model on: what a run has held out, or all of a file, a folder or a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic import ranks
from moesaic.train import evaluate
from moesaic.train.chat import LossOn, Renderer, named_in_template
from moesaic.train.corpus import Conversation, Document, all_documents, fingerprint
from moesaic.train.errors import UserError
from moesaic.train.loader import IGNORED
from moesaic.train.packing import Conversations, PackedRows

# Tokens in a row of text where nothing else is said.
_WINDOW = 1024


@dataclass(frozen=True)
class Measured:
    """Rows of a set of documents."""

    rows: evaluate.HeldOut
    documents: int
    """How many documents or conversations are in the rows."""
    left_out: int
    """How many are not: they are beyond the number of bytes, or have nothing to learn in a row."""

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted."""
        return int((self.rows.targets != IGNORED).sum())


@dataclass(frozen=True)
class Form:
    """How documents become rows."""

    loss_on: LossOn = "assistant"
    packing: bool = True
    seq_len: int | None = None
    """By default 1,024 for text, and the longest conversation; at most `positions`."""
    positions: int | None = None
    """How many the model was made for, if that is known."""
    max_bytes: int = 2**20
    characters: int | None = None
    """Of each text only so many count; None: all."""


def read_documents(
    data: str, tokenizer: Any, text_column: str | None, notify: Callable[[str], None]
) -> Sequence[Document]:
    """All of `data`, which every rank reads. Collective. Raises `UserError` on all ranks."""
    own: list[Sequence[Document]] = []

    def read() -> str:
        # Not given back: results go to all ranks.
        own.append(all_documents(data, text_column, roles=named_in_template(tokenizer), notify=notify))
        return fingerprint(own[0])

    if len(set(ranks.together(read))) > 1:
        raise UserError(f"--data {data}: the ranks see different data; give all of them the same")
    return own[0]


def as_rows(documents: Sequence[Document], tokenizer: Any, form: Form, notify: Callable[[str], None]) -> Measured:
    """The rows of documents, with a mask. `notify` is told of conversations that are cut.

    Raises `UserError` if no conversation has anything to learn in a row.
    """
    if not isinstance(documents[0], Conversation):
        texts = evaluate.choose_texts(documents, form.max_bytes, form.characters)
        seq_len = form.seq_len or min(_WINDOW, form.positions or _WINDOW)
        rows = evaluate.cut_windows(texts, tokenizer, seq_len, masked=True)
        return Measured(rows, len(texts), len(documents) - len(texts))
    sizes = np.cumsum([len(document.text.encode()) for document in documents])
    count = max(1, int(np.searchsorted(sizes, form.max_bytes, side="right")))
    conversations = render_all(Renderer(tokenizer, form.loss_on), documents[:count])
    longest = int(np.diff(conversations.ends, prepend=0).max()) - 1
    seq_len = form.seq_len or max(2, min(longest, form.positions or longest))
    packed = PackedRows(conversations, seq_len, packed=form.packing, pad_id=tokenizer.eos_token_id)
    if packed.cut:
        notify(packed.describe_cut(f"--seq-len {seq_len}"))
    if not len(packed):
        raise UserError(
            f"--seq-len {seq_len}: no conversation has anything to learn within this length; use a larger one"
        )
    return Measured(
        evaluate.take_rows(packed, masked=True), count - packed.left_out, len(documents) - count + packed.left_out
    )


def render_all(renderer: Renderer, conversations: Sequence[Any]) -> Conversations:
    """The tokens of conversations."""
    dtype = token_dtype(renderer.tokenizer)
    rendered = [renderer.render(conversation) for conversation in conversations]
    return Conversations(
        np.concatenate([np.asarray(part.ids, dtype) for part in rendered]),
        np.concatenate([np.asarray(part.counted, bool) for part in rendered]),
        np.cumsum([len(part.ids) for part in rendered], dtype=np.int64),
    )


def token_dtype(tokenizer: Any) -> type[np.unsignedinteger]:
    """The dtype for the ids of a tokenizer."""
    # Not by their number: ids may have gaps.
    return np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
