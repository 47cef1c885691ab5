"""Noise on the tokens of a layer in training: Mixtral's ``router_jitter_noise``, and that of Switch Transformers.

Source: Fedus et al., "Switch Transformers", section 2.2 (arXiv 2101.03961).
"""

import torch
from torch import Tensor


def jittered(x: Tensor, size: float) -> Tensor:
    """``x * u``, ``u`` uniform in ``1 - size`` to ``1 + size``, one number for each number of ``x``, in its dtype.

    Numbers come from torch's default generator of the device, as those of dropout do: activation checkpointing draws
    the same ones again, and ranks with other tokens should have other seeds. With size 0 nothing is drawn.
    """
    return x * torch.empty_like(x).uniform_(1 - size, 1 + size) if size else x
