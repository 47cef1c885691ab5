"""Dropout of what an adapter is applied to: a mask that is computed and not drawn.

Whether a number stays is a hash of a key of its row and of the number of its column. So it does not depend on what else
is there: a rank that has some of the rows, or some of the columns, has its part of the mask that one process has. The
backward pass computes it again, and nothing is kept.

Legend: R rows, I columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Of splitmix64 (Steele, Lea and Flood 2014), as signed numbers, and of the last step of MurmurHash3 (32 bits).
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_FIRST_32, _SECOND_32 = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32
# Of rows of tokens, of hidden rows, and of tokens before they are routed: each has masks of its own.
TOKENS, HIDDEN, ROUTER = 1, 2, 3


class Dropout(NamedTuple):
    """What decides which numbers stay.

    Attributes:
        p: the share of numbers that become zero; the others are divided by ``1 - p``.
        keys_TK: a key for each copy of a token, int64.
        columns_F: the numbers of the hidden columns, int64.
    """

    p: float
    keys_TK: Tensor
    columns_F: Tensor


def check_dropout(dropout: float) -> None:
    """Raise ``ValueError`` for what is no probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: must be a number, at least 0 and below 1, got {dropout!r}")


def mixed(keys: Tensor, number: Tensor | int) -> Tensor:
    """New keys, int64, out of keys and numbers, which look drawn at random."""
    # Integers wrap around.
    h = keys + (torch.as_tensor(number, dtype=torch.int64, device=keys.device) + 1) * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        h = (h ^ _right(h, shift, 64)) * factor
    return h ^ _right(h, 31, 64)


def kept(keys_R: Tensor, columns_I: Tensor, which: int, p: float) -> Tensor:
    """Which numbers stay, ``[R, I]`` bool: each with probability ``1 - p``.

    Args:
        keys_R: a key for each row, int64.
        columns_I: the numbers of the columns, int64.
        which: ``TOKENS``, ``HIDDEN`` or ``ROUTER``.
    """
    rows_R1 = mixed(keys_R, which).to(torch.int32).unsqueeze(1)
    h = rows_R1 + mixed(columns_I, 0).to(torch.int32)
    for shift, factor in ((16, _FIRST_32), (13, _SECOND_32)):
        h ^= _right(h, shift, 32)
        h *= factor
    h ^= _right(h, 16, 32)
    return h >= round(p * 2**32) - 2**31


def dropped(x_RI: Tensor, keep_RI: Tensor, p: float) -> Tensor:
    """``x / (1 - p)`` where it is kept, else zero. It is its own derivative."""
    return torch.where(keep_RI, x_RI * (1 / (1 - p)), 0)


def _right(h: Tensor, bits: int, width: int) -> Tensor:
    """A shift to the right in which the sign is a bit like any other."""
    return (h >> bits) & ((1 << (width - bits)) - 1)
