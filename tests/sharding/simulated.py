"""DTensors on simulated ranks, as the proof of a rule has them, for tests; and one real rank's part of a value."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from moesaic.sharding.proof.placing import split
from moesaic.sharding.simulated import Ranks, no_collectives, simulated_ranks, whole

__all__ = ["Ranks", "no_collectives", "part_of", "simulated_ranks", "whole"]


def part_of(value: Tensor, placements: Sequence[Placement], shape: Sequence[int], coordinate: Sequence[int]) -> Tensor:
    """One rank's part of a global value."""
    rank = int(torch.arange(prod(shape)).view(*shape)[tuple(coordinate)])
    return split(value, tuple(placements), shape)[rank].clone()
