"""Batches of fixed windows over a token array, in an order that depends on the seed alone.

Sample `n` of a run is window `permutation(seed, n // windows)[n % windows]`. A step takes the next `batch_size`
samples, and each data-parallel rank its own equal part of them; so the state is one number, and it means the same on
any layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.train.errors import UserError


class WindowLoader:
    """Endless batches `[batch_size / dp_size, seq_len + 1]` of int64 tokens: inputs and, one further, targets.

    Windows overlap by one token, so that every token but the first is a target once an epoch; tokens past the last
    whole window are left out. Raises `UserError` if the text is shorter than a window or the ranks do not divide the
    batch.
    """

    def __init__(
        self, tokens: np.ndarray, *, seq_len: int, batch_size: int, seed: int, dp_rank: int = 0, dp_size: int = 1
    ):
        self.windows = (len(tokens) - 1) // seq_len
        if self.windows < 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens, less than one window of {seq_len + 1}: give it more text "
                "or a smaller --seq-len"
            )
        if batch_size % dp_size:
            near = max(1, round(batch_size / dp_size)) * dp_size
            raise UserError(f"--batch-size {batch_size} does not divide by {dp_size} data parallel ranks; {near} would")
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.sample = 0
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def next_batch(self) -> Tensor:
        """This rank's part of the next batch."""
        size = self.batch_size // self.dp_size
        first = self.sample + self.dp_rank * size
        self.sample += self.batch_size
        starts = [self._window(index) * self.seq_len for index in range(first, first + size)]
        rows = np.stack([self.tokens[start : start + self.seq_len + 1] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """Where the run is in its data, as JSON values; the same on every rank and every layout."""
        return {"sample": self.sample, "seed": self.seed, "seq_len": self.seq_len, "windows": self.windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises `UserError` if that was with other windows or another order."""
        for name in ("seed", "seq_len", "windows"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"cannot go on with the same data: {name} was {state[name]} and now is {getattr(self, name)}"
                )
        self.sample = state["sample"]

    def _window(self, sample: int) -> int:
        epoch, position = divmod(sample, self.windows)
        if epoch != self._epoch:
            # RandomState is numpy's frozen generator: its streams are the same in every version.
            bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
            self._order = np.random.RandomState(bits).permutation(self.windows)
            self._epoch = epoch
        return int(self._order[position])
