"""Conversations of many lengths in rows of one length, each apart from the others in its row.

Positions begin at 0 with every conversation of a row, and transformers' attention masks follow from that: tokens see
those of their own conversation only. `check_apart` tries it on the model.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moesaic import ranks
from moesaic.parallel.mesh import Meshes
from moesaic.train.errors import UserError
from moesaic.train.loader import IGNORED, Row
from moesaic.train.step import evaluating, whole_logits

# Of the largest logit. How sums round depends on what else is in a row; a leak is larger.
_APART = 1e-3


class Conversations(NamedTuple):
    """The tokens of many conversations, one after the other; `ends[i]` is where number i ends."""

    tokens: np.ndarray
    counted: np.ndarray
    """Of each token whether it is a target."""
    ends: np.ndarray


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows of `capacity` as the rule best fit, the longest first, comes to.

    Example:
        >>> pack([3, 5, 2], 5)
        [[1], [0, 2]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (space left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect_left(free, (lengths[item], -1))
        if place == len(free):
            free.append((capacity, len(rows)))
            rows.append([])
        space, row = free.pop(place)
        rows[row].append(item)
        insort(free, (space - lengths[item], row))
    return rows


class PackedRows:
    """Rows of `seq_len` tokens and their targets. A longer conversation is cut at its end.

    With `packed` several share a row, else each has its own.

    Attributes:
        conversations: all of them.
        cut: how many conversations were.
        shortened: of how many learned tokens were cut.
        left_out: how many have nothing to learn in what is left.
    """

    def __init__(self, conversations: Conversations, seq_len: int, *, packed: bool, pad_id: int):
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.conversations = conversations
        starts = np.concatenate([[0], conversations.ends[:-1]]).astype(np.int64)
        # The last token is nobody's input.
        lengths = np.minimum(np.maximum(conversations.ends - starts - 1, 0), seq_len)
        total = np.concatenate([[0], np.cumsum(conversations.counted, dtype=np.int64)])
        counts = (
            total[np.minimum(starts + 1, conversations.ends) + lengths]
            - total[np.minimum(starts + 1, conversations.ends)]
        )
        whole = total[conversations.ends] - total[np.minimum(starts + 1, conversations.ends)]
        self.shortened = int((counts < whole).sum())
        learned = np.flatnonzero((lengths > 0) & (counts > 0))
        self.cut = int((conversations.ends - starts - 1 > seq_len).sum())
        self.left_out = len(conversations.ends) - len(learned)
        self._spans = [(int(starts[item]), int(lengths[item])) for item in learned]
        self._counts = counts[learned]
        lengths = [length for _, length in self._spans]
        self._rows = pack(lengths, seq_len) if packed else [[item] for item in range(len(lengths))]

    @property
    def shared(self) -> bool:
        """Whether there is a row of more than one conversation."""
        return any(len(row) > 1 for row in self._rows)

    def check_not_empty(self, which: str = "conversation") -> None:
        """Raise `UserError` if there is no row, for no conversation has anything to learn; `which` is what it was."""
        if not len(self):
            raise UserError(
                f"--seq-len {self.seq_len}: no {which} has anything to learn within this length; use a larger one"
            )

    def describe_cut(self, limit: str) -> str:
        """What is cut, and what is lost by that."""
        total = len(self.conversations.ends)
        lost = f", and {self.shortened} of them lose tokens to learn" if self.shortened else ""
        return f"{self.cut} of {total} conversations are longer than {limit}; they are cut{lost}"

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        """Row `index`; what is left of it at the end is padding, a conversation of its own without targets."""
        inputs = np.full(self.seq_len, self.pad_id, np.int64)
        targets = np.full(self.seq_len, IGNORED, np.int64)
        positions = np.zeros(self.seq_len, np.int64)
        everything, at = self.conversations, 0
        for item in self._rows[index]:
            start, length = self._spans[item]
            here, following = slice(at, at + length), slice(start + 1, start + 1 + length)
            inputs[here] = everything.tokens[start : start + length]
            learned = everything.counted[following]
            targets[here][learned] = everything.tokens[following][learned]
            positions[here] = np.arange(length)
            at += length
        positions[at:] = np.arange(self.seq_len - at)
        return Row(inputs, targets, positions, np.arange(self.seq_len) < at)

    def num_targets(self, index: int) -> int:
        """How many targets row `index` has: at least one."""
        return int(self._counts[self._rows[index]].sum())


def check_apart(model: Any, meshes: Meshes, *, vocab_size: int, device: torch.device) -> None:
    """Raise `UserError` if a conversation's logits depend on what is before it in its row. Collective."""
    rows = (torch.arange(16) * 3 + 1 + torch.tensor([[0], [7]])) % vocab_size
    rows[1, 8:] = rows[0, 8:]
    positions = torch.arange(8).repeat(2).expand(2, 16)
    # Every rank has the same two rows, and looks at what it has of their equal halves.
    with evaluating(model):
        logits = whole_logits(model, rows.to(device), position_ids=positions.to(device))
    second = meshes.sequence_positions(16) >= 8
    one, other = logits[:, second].float()
    worst = max(ranks.gather(float((one - other).abs().max() / one.abs().max()) if second.any() else 0.0))
    if not worst <= _APART:
        raise UserError(
            f"--packing: conversations that share a row would see one another in {model.config.model_type}, its logits "
            f"differ by {worst:.1e} of the largest; choose --no-packing"
        )
