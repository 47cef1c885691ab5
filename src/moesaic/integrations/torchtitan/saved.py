"""Which of our operators torchtitan's selective activation checkpointing saves.

It saves the results of operators on a list, and computes everything else again in the backward pass. Its exchange of
rows between ranks is on the list by torch's own operator, which is ours too.
"""

import torch
from torchtitan.distributed.activation_checkpoint import SelectiveAC

import moesaic.parallel.traffic  # noqa: F401  has one of the operators

SAVED = {
    torch.ops.moesaic.experts_mlp.default,
    torch.ops.moesaic.grouped_mm.default,
    torch.ops.moesaic.traffic.default,  # waits for the device
}


def save_our_operators() -> None:
    """Put our operators on the list of ``SelectiveAC``, in this process from now on."""
    stock = SelectiveAC.get_save_ops

    def get_save_ops(self: SelectiveAC) -> set:
        return stock(self) | SAVED

    SelectiveAC.get_save_ops = get_save_ops
