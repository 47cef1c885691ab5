"""Which tensors of a transformers MoE block are which of a :class:`moesaic.MoE`, and how their layouts differ.

Legend: E experts, F expert hidden dim, D model dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    """One tensor of theirs, and those of ours that hold the same numbers.

    Attributes:
        theirs, ours: names within the block and within the layer.
        split: from theirs to ours, views.
        join: from ours to theirs.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[..., Tensor]

    @property
    def is_bias(self) -> bool:
        """Of the router's scores, which the layer keeps in fp32."""
        return self.ours == ("router.bias",)


def same(theirs: str, ours: str) -> Link:
    """Equal but for the name."""
    return Link(theirs, (ours,), lambda t: (t,), lambda t: t)


# [E, 2F, D] and [E, D, F], as linear layers have them.
GATE_UP = Link(
    "experts.gate_up_proj",
    ("experts.w1", "experts.w3"),
    lambda t: t.mT.chunk(2, dim=2),
    lambda w1, w3: torch.cat([w1.mT, w3.mT], dim=1),
)
DOWN = Link("experts.down_proj", ("experts.w2",), lambda t: (t.mT,), lambda w2: w2.mT)
EXPERTS = (GATE_UP, DOWN)

# Without gate: [E, F, D] and [E, D, F].
UNGATED_EXPERTS = (Link("experts.up_proj", ("experts.w1",), lambda t: (t.mT,), lambda w1: w1.mT), DOWN)

# [E, D, 2F] and [E, F, D], as they are multiplied.
TRANSPOSED_GATE_UP = Link(
    "experts.gate_up_proj",
    ("experts.w1", "experts.w3"),
    lambda t: t.chunk(2, dim=2),
    lambda w1, w3: torch.cat([w1, w3], dim=2),
)
TRANSPOSED_EXPERTS = (TRANSPOSED_GATE_UP, same("experts.down_proj", "experts.w2"))

# [E, D, 2F] and [E, 2F], gate and up in turn.
INTERLEAVED_GATE_UP = Link(
    "experts.gate_up_proj",
    ("experts.w1", "experts.w3"),
    lambda t: (t[..., ::2], t[..., 1::2]),
    lambda w1, w3: torch.stack([w1, w3], dim=3).flatten(2),
)
INTERLEAVED_BIASES = Link(
    "experts.gate_up_proj_bias",
    ("experts.b1", "experts.b3"),
    lambda t: (t[..., ::2], t[..., 1::2]),
    lambda b1, b3: torch.stack([b1, b3], dim=2).flatten(1),
)
INTERLEAVED_EXPERTS = (
    INTERLEAVED_GATE_UP,
    INTERLEAVED_BIASES,
    same("experts.down_proj", "experts.w2"),
    same("experts.down_proj_bias", "experts.b2"),
)


def shared(name: str) -> tuple[Link, ...]:
    """The dense expert that every token goes through."""
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return tuple(same(f"{name}.{theirs}.weight", f"shared.{ours}.weight") for theirs, ours in names.items())


def ungated_shared(name: str) -> tuple[Link, ...]:
    """The same without gate."""
    return (
        same(f"{name}.up_proj.weight", "shared.w1.weight"),
        same(f"{name}.down_proj.weight", "shared.w2.weight"),
    )


def row(theirs: str, ours: str) -> Link:
    """``[1, E]`` there and ``[E]`` here."""
    return Link(theirs, (ours,), lambda t: (t.squeeze(0),), lambda t: t.unsqueeze(0))
