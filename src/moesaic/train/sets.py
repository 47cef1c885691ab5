"""Data as rows to measure a model on: what a run has held out, or all of a file, a folder or a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic import ranks
from moesaic.train import evaluate
from moesaic.train.chat import LossOn, Renderer, named_in_template
from moesaic.train.config import TrainConfig
from moesaic.train.corpus import Conversation, Document, all_documents, fingerprint
from moesaic.train.errors import UserError
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
    shared: bool = False
    """Whether conversations share a row. Then `check_apart` has to say that the model keeps them apart."""


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
    count = evaluate.count_within(documents, form.max_bytes)
    conversations = render_all(Renderer(tokenizer, form.loss_on), documents[:count])
    longest = int(np.diff(conversations.ends, prepend=0).max()) - 1
    seq_len = form.seq_len or max(2, min(longest, form.positions or longest))
    packed = PackedRows(conversations, seq_len, packed=form.packing, pad_id=tokenizer.eos_token_id)
    if packed.cut:
        notify(packed.describe_cut(f"--seq-len {seq_len}"))
    packed.check_not_empty()
    left_out = len(documents) - count + packed.left_out
    return Measured(evaluate.take_rows(packed, masked=True), count - packed.left_out, left_out, packed.shared)


@dataclass(frozen=True)
class EvalSet:
    """A set that a run measures beside what it holds out."""

    label: str
    """The name of its file or folder, different for each set."""
    measured: Measured

    @property
    def name(self) -> str:
        """Of its score, in metrics: `bits_per_byte/label` of text, and `held_out_loss/label` of conversations."""
        kind = "bits_per_byte" if isinstance(self.measured.rows, evaluate.HeldOutText) else "held_out_loss"
        return f"{kind}/{self.label}"

    def measure(self, model: Any, **options: Any) -> float:
        """Its score. Collective. Options are those of `evaluate.nats`."""
        rows = self.measured.rows
        if isinstance(rows, evaluate.HeldOutText):
            return evaluate.bits_per_byte(model, rows, **options)
        return evaluate.mean_loss(model, rows, **options)


def read_eval_sets(config: TrainConfig, tokenizer: Any, notify: Callable[[str], None]) -> tuple[EvalSet, ...]:
    """The sets of `--eval-data`. Collective. Raises `UserError` on all ranks."""
    found: dict[str, EvalSet] = {}
    for data in config.eval_data:
        label, count = Path(data).stem or data, 2
        while label in found:
            label, count = f"{Path(data).stem or data}-{count}", count + 1
        found[label] = EvalSet(label, _read_eval_set(data, config, tokenizer, notify))
    return tuple(found.values())


def _read_eval_set(data: str, config: TrainConfig, tokenizer: Any, notify: Callable[[str], None]) -> Measured:
    def about(text: str) -> str:
        # What is about a file names it already.
        is_of_file = text.startswith("--data ")
        return f"--eval-data {text.removeprefix('--data ') if is_of_file else f'{data}: {text}'}"

    def tell(text: str) -> None:
        notify(about(text))

    form = Form(config.loss_on, config.packing, config.seq_len, max_bytes=config.eval_bytes)
    try:
        documents = read_documents(data, tokenizer, config.text_column, tell)
        return as_rows(documents, tokenizer, form, tell)
    except UserError as error:
        raise UserError(about(str(error))) from error


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
