"""How ranks share the positions of a sequence.

Along tp a rank has one slice, as DTensor's ``Shard`` cuts it. Along cp it has two: attention is causal, so the work of
a query grows with its position. The sequence is cut into ``2 cp`` chunks, and rank r has the chunks r and
``2 cp - 1 - r``, head and tail. So all ranks have equally much to do.
"""

import torch
from torch import Tensor


def sequence_slices(length: int, num_shards: int) -> list[slice]:
    """How ``Shard`` cuts a length: pieces of ``ceil(length / num_shards)``, the last ones short or empty."""
    size = -(-length // num_shards)
    return [slice(min(i * size, length), min((i + 1) * size, length)) for i in range(num_shards)]


def head_tail_slices(length: int, cp: int) -> list[tuple[slice, ...]]:
    """The chunks of each rank of cp, in the order of positions. A rank alone has the whole sequence as one."""
    if cp == 1:
        return [(slice(0, length),)]
    chunks = sequence_slices(length, 2 * cp)
    return [(chunks[rank], chunks[-1 - rank]) for rank in range(cp)]


def positions_of_parts(length: int, cp: int, tp: int) -> list[Tensor]:
    """The positions of each rank, those of tp together. In each part they rise."""
    positions = torch.arange(length)
    of_cp = [torch.cat([positions[chunk] for chunk in chunks]) for chunks in head_tail_slices(length, cp)]
    return [part[shard] for part in of_cp for shard in sequence_slices(len(part), tp)]
