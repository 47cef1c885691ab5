"""What ``impl="torch"`` moves between its products, on tensors without memory: hardly more than has to be."""

import pytest
import torch
from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.moved import Moved
from torch import Tensor

from moesaic.ops.experts_mlp.impl import torch as impl
from moesaic.ops.experts_mlp.problem import Problem, Projection, Target, Targets, Wanted

TOKENS = 32768
BYTES = 2  # of bf16


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem_of(shape: Shape, biased: bool) -> Problem:
    D, F, E, K = shape.D, shape.F, shape.E, shape.K

    def projection(inner: int, columns: int) -> Projection:
        return Projection(empty(E, inner, columns), empty(E, columns) if biased else None)

    ids, weights = empty(TOKENS, K, dtype=torch.int64), empty(TOKENS, K, dtype=torch.float32)
    up = (projection(D, F), projection(D, F))
    return Problem(empty(TOKENS, D), ids, weights, up, projection(F, D), "silu")


def targets(projection: Projection) -> Targets:
    weight, bias = projection
    return Targets(Target(weight), None if bias is None else Target(bias))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_bytes_between_products(shape):
    problem = problem_of(shape, biased="gpt-oss" in shape.name)
    rows = TOKENS * shape.K
    # Rows of the model dim and of the hidden dim, and tokens.
    wide, narrow, tokens = rows * shape.D * BYTES, rows * shape.F * BYTES, TOKENS * shape.D * BYTES
    with Moved() as inference:
        impl.forward(problem, save=False)
    with Moved() as forward:
        kept = impl.forward(problem, save=True).hidden
    with Moved() as backward:
        up = tuple(map(targets, problem.projections))
        impl.backward(empty(TOKENS, shape.D), problem, kept, Wanted(True, True, up, targets(problem.down)))
    # Gather the tokens; read gate and up, write the hidden rows; read rows, write sums.
    least = 2 * wide + 3 * narrow + wide + tokens
    assert inference.bytes <= 1.3 * least
    # What is kept lies by slot.
    assert forward.bytes <= 1.3 * (least + 2 * narrow)
    # Gather tokens and gradients; from three arrays of hidden dims to three; read rows, write sums.
    assert backward.bytes <= 1.3 * (4 * wide + 6 * narrow + wide + tokens)
    assert forward.launches <= 40
    assert backward.launches <= 90
