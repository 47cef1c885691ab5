"""Bring tokens to experts and back, on one process.

Dispatch and combine are two phases. A frozen record goes from the first to the second. So a parallel dispatcher can
communicate before and after the experts.

Legend: T tokens, K copies of each token (top-k), D model dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moesaic.layers.router import Routing


class Dispatched(NamedTuple):
    """Tokens where the experts are, and what ``combine`` needs to bring the results back.

    Attributes:
        x: the tokens, in a form that :func:`moesaic.experts_mlp` takes, with or without blocks.
        topk_ids, topk_weights: the routing of these tokens.
        record: for the dispatcher that made it, and for no one else.
        beside: for what ``meanwhile`` gave, once nothing else is left to do.
        keys: those of the routing, for the dropout of adapters, in the form of ``topk_ids``.
        copies: which of the tokens' copies are here, as :func:`moesaic.experts_mlp` takes it; None if all may be.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    record: Any
    beside: Callable[[], Tensor] | None = None
    keys: Tensor | None = None
    copies: Tensor | None = None


class Dispatcher(Protocol):
    """The two phases around the experts."""

    def dispatch(
        self, x: Tensor, routing: Routing, num_experts: int, meanwhile: partial[Tensor] | None = None
    ) -> Dispatched:
        """Bring tokens ``x [T, D]`` to the experts; call ``meanwhile`` while they are under way.

        Its arguments are the tensors that it reads, but for parameters: it may run on a stream of its own.
        """
        ...

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the experts' results ``z`` back: ``[T, D]``. ``z`` has the shape of the dispatched tokens."""
        ...


class LocalDispatcher:
    """The dispatcher of one process. All experts and all tokens are here, so nothing moves."""

    def dispatch(
        self, x: Tensor, routing: Routing, num_experts: int, meanwhile: partial[Tensor] | None = None
    ) -> Dispatched:
        result = None if meanwhile is None else meanwhile()
        beside = None if result is None else lambda: result
        return Dispatched(x, routing.ids, routing.weights, None, beside, routing.keys)

    def combine(self, z: Tensor, dispatched: Dispatched) -> Tensor:
        return z
