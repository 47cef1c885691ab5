"""Batches of rows of equal length, in an order that depends on the seed alone.

Sample `n` of a run is row `permutation(seed, n // rows)[n % rows]`. A step takes the next `batch_size` samples, and
each data-parallel rank its own equal part of them; so the state is one number, and it means the same on any layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from moesaic.train.errors import UserError

# What a target is where nothing is learned.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A rank's rows, `[B, S]` each."""

    inputs: Tensor
    targets: Tensor
    """What comes next; -100 where that is not learned."""
    positions: Tensor | None
    """Of each token in its conversation, where several share a row."""
    num_targets: int
    """Of all ranks together."""
    mask: Tensor | None = None
    """False where there is padding; None where there is none."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def split(self, parts: int) -> list[Batch]:
        """The same rows in equal parts, each with the number of targets of the whole step."""
        rows = len(self.inputs) // parts
        tensors = {name: t.split(rows) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return [replace(self, **{name: t[part] for name, t in tensors.items()}) for part in range(parts)]  # type: ignore[arg-type]


class Row(NamedTuple):
    """`[seq_len]` each."""

    inputs: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None
    mask: np.ndarray | None = None
    """False where there is padding; None where there is none."""


@runtime_checkable
class Rows(Protocol):
    """What a loader takes its batches from."""

    seq_len: int

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """A row."""
        ...

    def num_targets(self, index: int) -> int:
        """How many targets a row has."""
        ...


class Windows:
    """Fixed windows over a token array, and as targets the same one further.

    Every token but the first is a target once an epoch; tokens past the last whole window are left out. Raises
    `UserError` if the text is shorter than a window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self.seq_len = seq_len
        self._tokens = tokens
        if len(self) < 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens, less than one window of {seq_len + 1}: give it more text "
                "or a smaller --seq-len"
            )

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.seq_len

    def row(self, index: int) -> Row:
        """Window `index`."""
        start = index * self.seq_len
        window = self._tokens[start : start + self.seq_len + 1].astype(np.int64)
        return Row(window[:-1], window[1:], None)

    def num_targets(self, index: int) -> int:
        """All of them."""
        return self.seq_len


def check_batch_size(batch_size: int, dp_size: int, passes: int) -> None:
    """Raise `UserError` unless ranks and passes divide the batch."""
    parts = dp_size * passes
    if batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        times = f" times the {passes} passes of --accumulate and --microbatches" if passes > 1 else ""
        raise UserError(
            f"--batch-size {batch_size} does not divide by {dp_size} data parallel ranks "
            f"(dp_replicate * dp_shard){times}; {near} does"
        )


class BatchLoader:
    """Endless batches of `batch_size / dp_size` rows, which `passes` divide, too. Raises `UserError` if they do not."""

    def __init__(self, rows: Rows, *, batch_size: int, seed: int, dp_rank: int = 0, dp_size: int = 1, passes: int = 1):
        check_batch_size(batch_size, dp_size, passes)
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.sample = 0
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def next_batch(self) -> Batch:
        """This rank's part of the next batch."""
        indices = [self._index(sample) for sample in range(self.sample, self.sample + self.batch_size)]
        self.sample += self.batch_size
        size = self.batch_size // self.dp_size
        own = indices[self.dp_rank * size : (self.dp_rank + 1) * size]
        return collate([self.rows.row(index) for index in own], sum(map(self.rows.num_targets, indices)))

    def state_dict(self) -> dict[str, Any]:
        """Where the run is in its data, as JSON values; the same on every rank and every layout."""
        return {"sample": self.sample, **self._fixed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises `UserError` if that was with other rows or another order."""
        for name, value in self._fixed().items():
            if state[name] != value:
                raise UserError(f"cannot go on with the same data: {name} was {state[name]} and now is {value}")
        self.sample = state["sample"]

    def _fixed(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.rows.seq_len, "windows": len(self.rows)}

    def _index(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self.rows))
        if epoch != self._epoch:
            # RandomState is numpy's frozen generator: its streams are the same in every version.
            bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
            self._order = np.random.RandomState(bits).permutation(len(self.rows))
            self._epoch = epoch
        return int(self._order[position])


def collate(rows: list[Row], num_targets: int) -> Batch:
    """Rows as tensors."""
    inputs, targets, positions, mask = (
        None if part[0] is None else torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)
    )
    assert inputs is not None
    assert targets is not None
    return Batch(inputs, targets, positions, num_targets, mask)
