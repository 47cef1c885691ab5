"""What decides the dropout of adapters: a number for each copy of each token, that does not depend on the layout.

It is a hash of a number that is drawn for the forward pass, of the place of the token among all tokens, and of the
copy. So ranks that hold parts of the tokens have parts of the masks that one process has.

Legend: T tokens, K copies a token (top-k), P ranks, D the dim of what is dropped.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.ops.experts_lora.dropout import TOKENS, dropped, kept, mixed


class Holders(NamedTuple):
    """The ranks that hold the tokens of a layer.

    Attributes:
        gather: the tensors ``[n]`` of all ranks, ``[P, n]``, in the order of ranks. Those that hold parts of the same
            sequences follow each other.
        rank: this one's number.
        parts: how many ranks hold parts of the same sequences.
        cp: how many pieces of a sequence they are parts of, laid out head and tail: piece r is the chunks r and
            ``2 cp - 1 - r`` of ``2 cp``. Each piece is cut in equal parts again, for ``parts / cp`` ranks.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int = 0
    parts: int = 1
    cp: int = 1


def _of_one_rank(t: Tensor) -> Tensor:
    return t.unsqueeze(0)


ALONE = Holders(_of_one_rank)  # not a lambda: layers are pickled


@torch.no_grad()
def copy_keys(leading: torch.Size, top_k: int, device: torch.device, holders: Holders = ALONE) -> Tensor:
    """``[T, K]`` int64, for the copies of this rank's tokens. Collective if there are several holders.

    The number for the forward pass is from torch's generator of the device, on the first rank. So activation
    checkpointing, which gives the generator its state again, finds the same masks.

    Args:
        leading: the leading shape of the tokens: ``[tokens]``, or ``[..., sequence]``.
        top_k: K.
    """
    rows, length = math.prod(leading[:-1]), leading[-1]
    drawn = torch.randint(2**62, (1,), device=device)
    sizes = torch.tensor([rows, length], device=device)
    all_P3 = holders.gather(torch.cat([drawn, sizes]))
    first = holders.rank // holders.parts * holders.parts
    if len(leading) == 1:
        # Tokens of no sequence are numbered through.
        row, place = 0, all_P3[: holders.rank, 2].sum()
    else:
        row, place = all_P3[: first : holders.parts, 1].sum(), all_P3[first : holders.rank, 2].sum()
    keys_B1 = mixed(all_P3[0, 0], row + torch.arange(rows, device=device)).unsqueeze(1)
    places = place + torch.arange(length, device=device)
    if holders.cp > 1 and len(leading) > 1:
        places = _head_tail(places, all_P3[first : first + holders.parts, 2], holders)
    keys_T = mixed(keys_B1, places).flatten()
    return mixed(keys_T.unsqueeze(1), torch.arange(top_k, device=device))


def _head_tail(places: Tensor, lengths_P: Tensor, holders: Holders) -> Tensor:
    """Positions in the sequence, of places in the parts laid end to end. Reads nothing to the host."""
    per_piece = holders.parts // holders.cp
    piece = holders.rank % holders.parts // per_piece
    within = places - lengths_P[: piece * per_piece].sum()
    chunk = (lengths_P.sum() + 2 * holders.cp - 1) // (2 * holders.cp)
    head = torch.minimum((lengths_P.sum() - piece * chunk).clamp(min=0), chunk)
    tail = (2 * holders.cp - 1 - piece) * chunk
    return torch.where(within < head, piece * chunk + within, tail + within - head)


class KeyedDropout(nn.Module):
    """A dropout whose masks do not depend on the layout: what ``nn.Dropout`` is on one process, with other masks.

    Args:
        p: the share of numbers that become zero in training mode; the others are divided by ``1 - p``.

    Attributes:
        holders: the ranks that hold the tokens. A parallel plan replaces it.
        first: the number of this rank's first column.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.holders, self.first = p, ALONE, 0

    def forward(self, x: Tensor) -> Tensor:
        """Drop numbers of tokens ``x [..., D]``. Collective in training mode, if there are several holders."""
        if not (self.training and self.p):
            return x
        keys_T = copy_keys(x.shape[:-1], 1, x.device, self.holders).squeeze(1)
        columns_D = torch.arange(self.first, self.first + x.shape[-1], device=x.device)
        return dropped(x, kept(keys_T, columns_D, TOKENS, self.p).view(x.shape), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
