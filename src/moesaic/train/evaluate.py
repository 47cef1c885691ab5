"""Held-out bits per byte of the sharded model, all ranks together, and how that is cut out of the text.

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

from moesaic.checkpoint import ranks
from moesaic.parallel.mesh import Meshes
from moesaic.train.corpus import Document
from moesaic.train.step import autocast
from moesaic.train.tokenizer import encode

_IGNORED = -100
# Of a long document only the beginning counts, so that the measured text is of many kinds.
_DOCUMENT_CHARACTERS = 16_384


@dataclass(frozen=True)
class HeldOut:
    """A part of the held-out text, as text and as windows of tokens. Every token of the text is a target once."""

    texts: list[str]
    num_bytes: int
    inputs: Tensor
    """`[N, S]`"""
    targets: Tensor
    """`[N, S]`; the ends of documents, which are not text, and padding are not targets."""


def choose_texts(documents: Sequence[Document], max_bytes: int) -> list[str]:
    """The beginnings of the first documents, `max_bytes` bytes in all (less by a character that would be cut)."""
    texts: list[str] = []
    left = max_bytes
    for document in documents:
        head = document.text[:_DOCUMENT_CHARACTERS].encode()[:left].decode(errors="ignore")
        if head:
            texts.append(head)
            left -= len(head.encode())
    return texts


def cut_windows(texts: list[str], tokenizer: Any, seq_len: int) -> HeldOut:
    """Windows over `texts`, each text after an end-of-text token. Windows do not overlap."""
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
    return HeldOut(texts, num_bytes, inputs, targets.masked_fill(targets == end, _IGNORED))


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, held_out: HeldOut, *, meshes: Meshes, batch_size: int, device: torch.device, dtype: str
) -> float:
    """The model's bits per byte of the held-out text: minus log2 of its probability, over its size. Collective.

    `batch_size` is over all ranks. The model is left in the mode, training or not, that it was in.
    """
    training = model.training
    model.eval()
    size = batch_size // meshes.dp_size
    # The last batch may be short, but every rank has to take part in every forward.
    missing = -len(held_out.inputs) % batch_size
    inputs_NS = F.pad(held_out.inputs, (0, 0, 0, missing))
    targets_NS = F.pad(held_out.targets, (0, 0, 0, missing), value=_IGNORED)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(meshes.dp_rank * size, len(inputs_NS), batch_size):
        inputs_BS = inputs_NS[start : start + size].to(device)
        targets_BS = targets_NS[start : start + size].to(device)
        with autocast(device, dtype):
            logits_BsV = model(input_ids=inputs_BS, use_cache=False).logits
        targets_Bs = targets_BS[:, meshes.sequence_slice(targets_BS.shape[1])]
        nats += F.cross_entropy(
            logits_BsV.flatten(0, 1).float(), targets_Bs.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
    if ranks.active():
        dist.all_reduce(nats)
    model.train(training)
    return nats.item() / log(2) / held_out.num_bytes
