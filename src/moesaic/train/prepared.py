"""What is in a folder of the cache: text, or conversations, as tokens; the tokenizer; what is held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.train import tokenizer as tokenizers
from moesaic.train.corpus import Conversation, Document
from moesaic.train.packing import Conversations


@dataclass(frozen=True)
class Prepared:
    """A folder of the cache."""

    folder: Path
    data_identity: str
    """Hash of all the text, what is held out included, and of which of it is learned."""
    tokenizer_identity: str
    """Hash of everything that decides which tokens a text becomes."""
    vocab_size: int
    eos_id: int
    train_bytes: int
    train_documents: int

    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return tokenizers.load(self.folder / "tokenizer")

    def _held_out_rows(self) -> list[dict[str, str]]:
        return json.loads((self.folder / "held_out.json").read_text())


class PreparedText(Prepared):
    """Of text."""

    def tokens(self) -> np.ndarray:
        """All training tokens, an end-of-text token before each document and after the last; mapped, not read."""
        return np.load(self.folder / "train.npy", mmap_mode="r")

    def byte_counts(self) -> np.ndarray:
        """`count_bytes` of the training text."""
        return np.load(self.folder / "byte_counts.npy")

    def held_out(self) -> list[Document]:
        """Documents that are never trained on, in a fixed order that has nothing to do with their content."""
        return [Document(**row) for row in self._held_out_rows()]


class PreparedConversations(Prepared):
    """Of conversations."""

    def train(self) -> Conversations:
        """Those for training; mapped, not read."""
        return load_conversations(self.folder, "train")

    def held_out(self) -> Conversations:
        """Those that are never trained on, in a fixed order that has nothing to do with their content."""
        return load_conversations(self.folder, "held_out")

    def held_out_documents(self) -> list[Conversation]:
        """The same as they were given."""
        return [Conversation(**row) for row in self._held_out_rows()]


def save_conversations(conversations: Conversations, folder: Path, name: str) -> None:
    """Write them for `load_conversations`."""
    for part, array in conversations._asdict().items():
        np.save(folder / f"{name}_{part}.npy", array)


def load_conversations(folder: Path, name: str) -> Conversations:
    """What `save_conversations` has written."""
    return Conversations(*(np.load(folder / f"{name}_{part}.npy", mmap_mode="r") for part in Conversations._fields))
