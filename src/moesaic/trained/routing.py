"""How a model routes the tokens that it is measured on: the load of each expert, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.layers.load import routers
from moesaic.layers.router import Routing
from moesaic.train.metrics import busiest


@dataclass
class Loads:
    """The tokens that each expert got: of each layer, by its name, `[E]`."""

    tokens: dict[str, list[int]] = field(default_factory=dict)


@contextmanager
def counting(model: nn.Module) -> Iterator[Loads]:
    """Count the tokens of all ranks while the model computes; the result is there at the end. Collective.

    Padding goes to no expert, and is not counted.
    """
    found = Loads()
    by_name = routers(model)
    counts = {name: torch.zeros_like(router.load) for name, router in by_name.items()}

    def add(counts_E: Tensor, module: nn.Module, args: Any, routing: Routing) -> None:
        ids = routing.ids.detach().flatten()
        counts_E.scatter_add_(0, ids.clamp(min=0), (ids >= 0).to(counts_E.dtype))

    handles = [router.register_forward_hook(partial(add, counts[name])) for name, router in by_name.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, router in by_name.items():
        # In the metrics of a run a layer has this name too.
        found.tokens[name.rpartition(".")[0]] = router.reduce_counts(counts[name]).tolist()


def describe(tokens: list[int]) -> dict[str, Any]:
    """Of a layer: the load, `busiest`, `entropy` and the experts without a token.

    The entropy is that of the shares of the load, over its maximum, log E: 1 is perfectly balanced, and 0 is one expert
    for all.
    """
    total = sum(tokens)
    shares = [count / total for count in tokens if count] if total else []
    entropy = -sum(share * math.log(share) for share in shares)
    return {
        "tokens": tokens,
        "busiest": busiest(tokens),
        "entropy": entropy / math.log(len(tokens)) if len(tokens) > 1 else 1.0,
        "dead": [expert for expert, count in enumerate(tokens) if not count],
    }
