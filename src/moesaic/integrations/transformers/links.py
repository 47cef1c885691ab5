"""Links between the tensors of a transformers MoE block and those of a :class:`moesaic.MoE`. Their layouts differ.

Legend: E experts, F expert hidden dim, D model dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    """One tensor of the block, and the tensors of the layer that hold the same numbers.

    Attributes:
        theirs, ours: names in the block and in the layer.
        split: turns the block's tensor into those of the layer, which are views of it.
        join: turns the layer's tensors into that of the block.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[..., Tensor]

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias on the router's scores, which the layer keeps in fp32."""
        return self.ours == ("router.bias",)


def same(theirs: str, ours: str) -> Link:
    """A tensor of which only the name differs."""
    return Link(theirs, (ours,), lambda t: (t,), lambda t: t)


# [E, 2F, D] and [E, D, F], the layout of linear layers.
GATE_UP = Link(
    "experts.gate_up_proj",
    ("experts.w1", "experts.w3"),
    lambda t: t.mT.chunk(2, dim=2),
    lambda w1, w3: torch.cat([w1.mT, w3.mT], dim=1),
)
DOWN = Link("experts.down_proj", ("experts.w2",), lambda t: (t.mT,), lambda w2: w2.mT)
EXPERTS = (GATE_UP, DOWN)

# Without a gate: [E, F, D] and [E, D, F].
UNGATED_EXPERTS = (Link("experts.up_proj", ("experts.w1",), lambda t: (t.mT,), lambda w1: w1.mT), DOWN)

# [E, D, 2F] and [E, F, D], the layout of a product x @ w.
TRANSPOSED_GATE_UP = Link(
    "experts.gate_up_proj",
    ("experts.w1", "experts.w3"),
    lambda t: t.chunk(2, dim=2),
    lambda w1, w3: torch.cat([w1, w3], dim=2),
)
TRANSPOSED_EXPERTS = (TRANSPOSED_GATE_UP, same("experts.down_proj", "experts.w2"))

# [E, D, 2F] and [E, 2F]: columns of gate and up alternate.
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
    """The shared expert, an MLP that every token goes through."""
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return tuple(same(f"{name}.{theirs}.weight", f"shared.{ours}.weight") for theirs, ours in names.items())


def ungated_shared(name: str) -> tuple[Link, ...]:
    """A shared expert without a gate."""
    return (
        same(f"{name}.up_proj.weight", "shared.w1.weight"),
        same(f"{name}.down_proj.weight", "shared.w2.weight"),
    )


def without_numbers(theirs: str, tensor: Tensor) -> Link:
    """A tensor of the block that has no elements. The layer has none for it."""
    shape, dtype = tensor.shape, tensor.dtype
    return Link(theirs, (), lambda t: (), lambda: torch.empty(shape, dtype=dtype))


def row(theirs: str, ours: str) -> Link:
    """A tensor that is ``[1, E]`` in the block and ``[E]`` in the layer."""
    return Link(theirs, (ours,), lambda t: (t.squeeze(0),), lambda t: t.unsqueeze(0))
