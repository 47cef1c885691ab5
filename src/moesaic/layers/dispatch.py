"""Bring tokens to experts and back, on one process.

Dispatch and combine are two phases with a frozen record between them, so that a parallel dispatcher can put
communication around the same local steps.

Legend: T tokens, K top-k, R rows, D model dim, E experts.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moesaic.layers.router import Routing
from moesaic.ops import Permutation, combine, permute, sort_by_expert


class Dispatched(NamedTuple):
    """Rows for the experts, and what ``combine`` needs to bring the results back.

    Attributes:
        rows: ``[R, D]``, grouped by expert.
        group_sizes: of the rows, as :func:`moesaic.grouped_mm` takes them.
        record: belongs to the dispatcher that made it.
    """

    rows: Tensor
    group_sizes: Tensor
    record: Any


class Dispatcher(Protocol):
    """The two phases around the experts."""

    def dispatch(self, x: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        """Lay tokens ``x [T, D]`` out as rows grouped by expert."""
        ...

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Weigh and sum the experts' results ``rows [R, D]`` back to tokens ``[T, D]``."""
        ...


def input_and_result_weights(weights: Tensor, routing: Routing) -> tuple[Tensor | None, Tensor | None]:
    """What to multiply the experts' inputs and results by: the weights where they belong, and None."""
    return (weights, None) if routing.weigh_inputs else (None, weights)


class _LocalRecord(NamedTuple):
    permutation: Permutation
    weights: Tensor | None


class LocalDispatcher:
    """All experts are here: sort, and un-sort."""

    def dispatch(self, x: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        permutation = sort_by_expert(routing.ids, num_experts)
        before, after = input_and_result_weights(routing.weights, routing)
        rows_RD = permute(x, permutation, before)
        return Dispatched(rows_RD, permutation.group_sizes, _LocalRecord(permutation, after))

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        record: _LocalRecord = dispatched.record
        return combine(rows, record.permutation, record.weights)
