"""The length of a row: one that fits the data and the model, and warnings where a given one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from moesaic.train.config import TrainConfig
from moesaic.train.prepared import PreparedConversations, PreparedText

_OF_TEXT = 128
# A single long conversation must not make all rows so long that they do not fit into memory.
_LONGEST = 4096
_MULTIPLE = 16


def fit_seq_len(
    config: TrainConfig, text: PreparedText | PreparedConversations, positions: Any, notify: Callable[[str], None]
) -> TrainConfig:
    """The settings with a `seq_len`. `notify` is told which one was chosen, and if the model has too few positions.

    `positions` is how many the model was made for; anything but a number if that is not known.
    """
    positions = positions if isinstance(positions, int) and positions > 1 else None
    longest = longest_conversation(text) if isinstance(text, PreparedConversations) else None
    seq_len = config.seq_len
    if seq_len is None and longest is None:
        seq_len = min(_OF_TEXT, positions or _OF_TEXT)
    elif seq_len is None:
        assert longest is not None
        seq_len = min(-(-longest // _MULTIPLE) * _MULTIPLE, _LONGEST, positions or _LONGEST)
        notify(f"--seq-len {seq_len}: the longest conversation has {longest} tokens")
    used = seq_len if longest is None else min(seq_len, longest)
    if positions is not None and used > positions:
        what = "sequences" if longest is None else "conversations"
        notify(
            f"warning: --seq-len {seq_len}: {what} of {used} tokens pass the {positions} positions that the model was "
            f"made for (max_position_embeddings); give at most --seq-len {positions}, or a model for longer ones"
        )
    return dataclasses.replace(config, seq_len=seq_len)


def longest_conversation(text: PreparedConversations) -> int:
    """The number of inputs of the longest conversation, held out or not: all of its tokens but the last. At least 2."""
    lengths = [np.diff(part.ends, prepend=0).max() for part in (text.train(), text.held_out()) if len(part.ends)]
    return max(2, int(max(lengths)) - 1)
