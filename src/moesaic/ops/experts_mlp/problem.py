"""What an implementation of experts_mlp is given, and gives back.

Legend: T tokens, K copies a token (top-k), D model dim, F hidden dim, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.experts_mlp.activation import Activation


class Problem(NamedTuple):
    """The arguments. Ids outside ``0 .. E - 1`` are copies that are not here."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    w1_EDF: Tensor
    w3_EDF: Tensor | None
    w2_EFD: Tensor
    b1_EF: Tensor | None
    b3_EF: Tensor | None
    activation: Activation


def number_by_matrix(ids_BTK: Tensor, G: int) -> Tensor:
    """Ids that count each block's own ``G`` experts as numbers of matrices; those of copies that are not here as -1.

    Of one block they are that already.
    """
    B = ids_BTK.shape[0]
    if B <= 1:
        return ids_BTK
    first_B11 = (torch.arange(B, device=ids_BTK.device) * G)[:, None, None]
    return torch.where((ids_BTK >= 0) & (ids_BTK < G), ids_BTK + first_B11, -1)


class Forward(NamedTuple):
    """The result, and the pre-activations ``x w1 + b1`` and ``x w3 + b3`` of every copy; zero where it is not here."""

    z_TD: Tensor
    h1_TKF: Tensor | None
    h3_TKF: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weights: bool
    w1: bool
    w3: bool
    w2: bool
    b1: bool
    b3: bool

    def pack(self) -> int:
        """As the bits of an int, which is what an operator can take."""
        return sum(int(wanted) << i for i, wanted in enumerate(self))

    @staticmethod
    def unpack(bits: int) -> "Needs":
        return Needs(*(bool(bits >> i & 1) for i in range(7)))


class MainGrads(NamedTuple):
    """Buffers of the accumulation dtype that gradients of the weights are added to; None where there is none to add.

    Their matrices are contiguous, or transposed ones that are. An expert without rows keeps its values.
    """

    w1: Tensor | None = None
    w3: Tensor | None = None
    w2: Tensor | None = None


NO_MAIN_GRADS = MainGrads()


class Gradients(NamedTuple):
    """The gradients, each of its argument's dtype; None where it is not wanted."""

    x: Tensor | None
    weights: Tensor | None
    w1: Tensor | None
    w3: Tensor | None
    w2: Tensor | None
    b1: Tensor | None
    b3: Tensor | None
