"""What the sharded model makes of held-out text, all ranks together: bits per byte, or the loss of conversations.

Legend: N windows, S positions, s positions of this rank's sequence shard, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic import ranks
from moesaic.parallel.mesh import Meshes
from moesaic.train.corpus import Document
from moesaic.train.loader import IGNORED, Batch, Rows, collate
from moesaic.train.step import autocast, evaluating, forward, sum_of_losses
from moesaic.train.tokenizer import encode

# Of a long document only the beginning counts, so that the measured text is of many kinds.
DOCUMENT_CHARACTERS = 16_384


@dataclass(frozen=True)
class HeldOut:
    """Rows of tokens and, as targets, what comes next; -100 where that is not measured."""

    inputs: Tensor
    """`[N, S]`"""
    targets: Tensor
    """`[N, S]`"""
    positions: Tensor | None = None
    """`[N, S]`, of each token in its conversation, where several share a row."""
    mask: Tensor | None = None
    """`[N, S]`, False for padding. Where it is given, padding goes to no expert."""

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted."""
        return int((self.targets != IGNORED).sum())


@dataclass(frozen=True, kw_only=True)
class HeldOutText(HeldOut):
    """A part of the held-out text, as text and as windows of tokens. Every token of the text is a target once.

    The ends of documents, which are not text, and padding are not targets.
    """

    texts: list[str]
    num_bytes: int


def choose_texts(
    documents: Sequence[Document], max_bytes: int, characters: int | None = DOCUMENT_CHARACTERS
) -> list[str]:
    """The beginnings of the first documents, `max_bytes` bytes in all (less by a character that would be cut).

    A beginning has at most `characters` characters; with None it is the whole document.
    """
    texts: list[str] = []
    left = max_bytes
    for document in documents:
        head = document.text[:characters].encode()[:left].decode(errors="ignore")
        if head:
            texts.append(head)
            left -= len(head.encode())
    return texts


def count_within(documents: Sequence[Document], max_bytes: int) -> int:
    """How many of the first documents have `max_bytes` bytes in all, at least 1."""
    sizes = np.cumsum([len(document.text.encode()) for document in documents])
    return max(1, int(np.searchsorted(sizes, max_bytes, side="right")))


def cut_windows(texts: list[str], tokenizer: Any, seq_len: int, *, masked: bool = False) -> HeldOutText:
    """Windows over `texts`, each text after an end-of-text token. Windows do not overlap. `masked`: with a mask."""
    end = tokenizer.eos_token_id
    tokens = [end]
    for ids in encode(tokenizer, texts):
        tokens += [*ids, end]
    count = -(-(len(tokens) - 1) // seq_len)
    padded = np.full(count * seq_len + 1, end, np.int64)
    padded[: len(tokens)] = tokens
    inputs = torch.from_numpy(padded[:-1]).view(count, seq_len)
    targets = torch.from_numpy(padded[1:]).view(count, seq_len)
    num_bytes = sum(len(text.encode()) for text in texts)
    mask = (torch.arange(count * seq_len) < len(tokens) - 1).view(count, seq_len) if masked else None
    targets = targets.masked_fill(targets == end, IGNORED)
    return HeldOutText(inputs, targets, mask=mask, texts=texts, num_bytes=num_bytes)


def take_rows(rows: Rows, *, masked: bool = False) -> HeldOut:
    """All of the rows. `masked`: with a mask."""
    batch = collate([rows.row(index) for index in range(len(rows))], 0)
    return HeldOut(batch.inputs, batch.targets, batch.positions, batch.mask if masked else None)


def bits_per_byte(model: nn.Module, held_out: HeldOutText, **options: Any) -> float:
    """The model's bits per byte of the held-out text: minus log2 of its probability, over its size. Collective.

    Options are those of `nats`.
    """
    return nats(model, held_out, **options) / log(2) / held_out.num_bytes


def mean_loss(model: nn.Module, held_out: HeldOut, **options: Any) -> float:
    """The model's loss of a held-out target, in nats, as in training. Collective. Options are those of `nats`."""
    return nats(model, held_out, **options) / held_out.num_targets


def nats(
    model: nn.Module, held_out: HeldOut, *, meshes: Meshes, batch_size: int, device: torch.device, dtype: str
) -> float:
    """Minus the logarithm of the probability the model gives to all targets. Collective.

    `batch_size` is over all ranks. The model is left in the mode, training or not, that it was in.
    """
    size = batch_size // meshes.dp_size
    # The last batch may be short, but every rank has to take part in every forward.
    missing = -len(held_out.inputs) % batch_size
    inputs_NS = F.pad(held_out.inputs, (0, 0, 0, missing))
    targets_NS = F.pad(held_out.targets, (0, 0, 0, missing), value=IGNORED)
    positions_NS, mask_NS = (
        None if t is None else F.pad(t, (0, 0, 0, missing)) for t in (held_out.positions, held_out.mask)
    )
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model):
        for start in range(meshes.dp_rank * size, len(inputs_NS), batch_size):
            own = slice(start, start + size)
            positions_BS = None if positions_NS is None else positions_NS[own]
            mask_BS = None if mask_NS is None else mask_NS[own]
            batch = Batch(inputs_NS[own], targets_NS[own], positions_BS, 0, mask_BS).to(device)
            with autocast(device, dtype):
                logits_BsV = forward(model, batch)
            if logits_BsV is not None:
                targets_Bs = batch.targets[:, meshes.sequence_positions(batch.targets.shape[1])]
                total += sum_of_losses(logits_BsV, targets_Bs)
    if ranks.active():
        dist.all_reduce(total)
    return total.item()
