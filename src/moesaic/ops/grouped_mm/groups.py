"""Where each group's rows lie. Shared by the implementations, which never import each other.

Where blocks have their own experts, group ``g`` of block ``b`` belongs to expert ``b * G + g``. There may be fewer
experts than groups; the last groups then have none, and are empty.

Legend: R rows, B blocks, C rows a block (R = B * C), G groups a block, E experts, a matrix each.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.arguments import check_dtype_of, check_fit
from moesaic.ops.quantized.weight import Weight


class Group(NamedTuple):
    """The rows of one expert inside one block."""

    rows: slice
    expert: int


def as_blocks(group_sizes: Tensor) -> Tensor:
    """Group sizes as ``[B, G]``: the flat form ``[E]`` is one block."""
    return group_sizes if group_sizes.ndim == 2 else group_sizes.unsqueeze(0)


def are_shared(num_matrices: int, group_sizes: Tensor) -> bool:
    """Whether the blocks share their experts (E is G) or each has its own (E is at most B * G)."""
    blocks = as_blocks(group_sizes)
    return blocks.shape[0] != 1 and num_matrices == blocks.shape[1]


def check_operands(operator: str, operands: Sequence[tuple[str, Weight, str]], group_sizes: Tensor) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the operands of an operator fit: sizes, blocks, device, dtype.

    Args:
        operands: of each its name, the tensor, and its dims by the letters of the legend, of which ``R`` is the first.
    """
    # Of flat sizes there may be more than matrices.
    sizes = check_fit(operator, [*operands, ("group_sizes", group_sizes, "G" if group_sizes.ndim == 1 else "BG")])
    name, first, _ = operands[0]
    check_dtype_of(operator, first.dtype, [(n, t) for n, t, _ in operands[1:]])
    B = sizes.get("B", 1)
    if (sizes["R"] % B if B else sizes["R"]) != 0:
        raise ValueError(f"{operator}: {name}: {sizes['R']} rows are not {B} equal blocks; pad every block to one size")


def check_group_sizes(num_rows: int, sizes_BG: Tensor, num_matrices: int) -> None:
    """Raise ``ValueError`` unless sizes are at least 0, fit the rows of their block, and have an expert or are 0.

    Reads values.
    """
    B, G = sizes_BG.shape
    if B == 0 or G == 0:
        return
    if int(sizes_BG.min()) < 0:
        raise ValueError(
            f"group_sizes: sizes must be at least 0, got {int(sizes_BG.min())}; "
            "pass how many rows each group has, not offsets or sentinels"
        )
    capacity, largest = num_rows // B, int(sizes_BG.sum(dim=1).max())
    if largest > capacity:
        raise ValueError(
            f"group_sizes: the groups of a block add up to {largest} rows, but x has {capacity} rows a block "
            f"({num_rows} rows in {B} blocks); pass counts, not cumulative offsets, or give x more rows"
        )
    if num_matrices >= B * G or are_shared(num_matrices, sizes_BG):
        return
    without_expert = sizes_BG.flatten()[num_matrices:]
    if bool(without_expert.any()):
        i = int(without_expert.nonzero()[0])
        b, g = divmod(num_matrices + i, G)
        raise ValueError(
            f"group_sizes: group {g} of block {b} has {int(without_expert[i])} rows but no expert: "
            f"w has {num_matrices} matrices for {B * G} groups; let groups past the last matrix be empty"
        )


def iterate_groups(num_rows: int, sizes_BG: Tensor, num_matrices: int) -> Iterator[Group]:
    """Yield every group that has rows, in row order. Reads the sizes; checks them first."""
    check_group_sizes(num_rows, sizes_BG, num_matrices)
    B, G = sizes_BG.shape
    shared = are_shared(num_matrices, sizes_BG)
    capacity = num_rows // B if B else 0
    for b, sizes in enumerate(sizes_BG.tolist()):
        start = b * capacity
        for g, size in enumerate(sizes):
            if size:
                yield Group(slice(start, start + size), g if shared else b * G + g)
            start += size


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the half types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
