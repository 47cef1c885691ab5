"""Bring tokens to experts and back, on one process.

Dispatch and combine are two phases with a frozen record between them, so that a parallel dispatcher can put
communication around the experts.

Legend: T tokens, K copies a token (top-k), D model dim.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moesaic.layers.router import Routing


class Dispatched(NamedTuple):
    """Tokens where the experts are, and what ``combine`` needs to bring the results back.

    Attributes:
        x: tokens, as :func:`moesaic.experts_mlp` takes them, in blocks or not.
        topk_ids, topk_weights: their routing.
        record: belongs to the dispatcher that made it.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    record: Any


class Dispatcher(Protocol):
    """The two phases around the experts."""

    def dispatch(self, x: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        """Bring tokens ``x [T, D]`` to the experts."""
        ...

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the experts' results ``z``, shaped as the dispatched tokens, back: ``[T, D]``."""
        ...


class LocalDispatcher:
    """All experts are here, and so are the tokens."""

    def dispatch(self, x: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        return Dispatched(x, routing.ids, routing.weights, None)

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        return z
