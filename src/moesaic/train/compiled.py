"""`--compile`: each decoder layer by torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic.parallel.decoder import decoder_layers
from moesaic.parallel.wrapped import decoders
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError

# Of one layer: with and without gradients, sizes that are fixed and that vary.
_PROGRAMS = 8


def check_compile(config: TrainConfig) -> None:
    """Raise `UserError` if `--compile` cannot work with the other settings."""
    if not config.compile:
        return
    if config.recompute != "none":
        raise UserError(
            f"--compile: not with --recompute {config.recompute}, for a checkpoint must be one graph, and a layer is "
            "several; leave one of them out"
        )
    if config.main_grads:
        raise UserError("--compile: not with --main-grads, whose buffers compiled code does not know; leave out one")


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile each layer on its own, after it has been laid over the ranks.

    Layers of one kind share their programs. With tp each has hooks of its own, and so programs of its own. torch's
    limit on programs of one function is then raised, for past it a layer would no longer be compiled.
    """
    layers = [layer for decoder in decoders(model) for layer in decoder_layers(decoder)]
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _PROGRAMS * len(layers))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 8 * dynamo.recompile_limit)
    for layer in layers:
        layer.compile(backend=backend)
