"""The passes between torch's products as Triton kernels, against what they are composed of."""

import pytest
import torch
from torch import Tensor

from moesaic.ops import ACTIVATIONS
from moesaic.ops.experts_mlp import passes as composed
from moesaic.ops.experts_mlp.activation import GATED_ONLY
from moesaic.ops.permute import kernels as permuting
from moesaic.ops.triton import available
from tests.ops.oracle import uninitialised_memory_is_nan

passes, unused = available.load("passes"), available.load("unused")
FORMS = [(a, gated) for a in ACTIVATIONS for gated in (True, False) if gated or a not in GATED_ONLY]
# Tokens, copies of each, experts, model dim, hidden dim: no power of two.
T, K, E, D, F = 7, 3, 4, 21, 19


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def made(request):
    """Rows of a routing in which copies are missing, and a token has none; values that no rounding changes much."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, E + 1, (T, K), generator=g)
    ids[2] = -1
    slots, positions, sizes = permuting.sort_by_expert(ids, E, T * K)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(request.param)

    return ids, slots, positions, int(sizes.sum()), values


def assert_same(actual: Tensor, expected: Tensor, rows: int | None = None) -> None:
    tolerance = 2e-2 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual[:rows], expected[:rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("activation", "gated", "biased"), [(*form, True) for form in FORMS] + [("silu", True, False)])
def test_hidden_rows_and_their_gradient(made, activation, gated, biased):
    ids, slots, positions, n, values = made
    h1, h3 = values(T * K, F), values(T * K, F) if gated else None
    # Biases of any strides.
    b1, b3 = values(F, E).t() if biased else None, values(E, F) if biased and gated else None
    args = h1, h3, b1, b3, ids.flatten(), slots, positions.flatten(), activation
    with uninitialised_memory_is_nan():
        a, *kept = passes.hidden_rows(*args, True)
        b, *nothing = passes.hidden_rows(*args, False)
    expected, *theirs = composed._hidden(*args, True)
    assert_same(a, expected, n)
    assert torch.equal(a[:n], b[:n])
    assert [len(t) for t in nothing] == [0, 0]
    for mine, other in zip(kept, theirs, strict=True):
        assert_same(mine, other)
    weights, ga = torch.rand(T * K), values(T * K, F)
    args = ga, theirs[0], theirs[1] if gated else None, weights, slots, positions.flatten(), activation
    with uninitialised_memory_is_nan():
        *rows, gweights = passes.hidden_gradient(*args)
    *expected, dots = composed._hidden_gradient(*args)
    for mine, other in zip(rows, expected, strict=True):
        assert mine.shape == other.shape
        assert_same(mine, other, n)
    torch.testing.assert_close(gweights, dots, rtol=1e-2, atol=1e-2)
    assert gweights.view(T, K)[positions < 0].eq(0).all()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("more", [True, False])
def test_sums_over_copies(made, weighted, biased, more):
    ids, slots, positions, n, values = made
    y, plus = values(T * K, D), values(T * K, D) if more else None
    # Rows of no copy may hold anything.
    y[n:] = torch.nan
    weights, biases = torch.rand(T, K) if weighted else None, values(D, E).t() if biased else None
    args = plus, weights, biases, ids, slots, positions
    z = passes.to_tokens(y, *args)
    assert_same(z, composed._to_tokens(y, *args))
    assert not z[2].any()


def test_matrices_without_rows_are_zero():
    w = torch.full((4, 90, 101), torch.nan)
    unused.zero_unused(w, torch.tensor([0, 3, 0, 1]))
    assert w[[0, 2]].eq(0).all()
    assert w[[1, 3]].isnan().all()


def test_nothing_to_do():
    nothing, index = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    a, *_ = passes.hidden_rows(nothing, nothing, None, None, index, index, index, "silu", True)
    assert a.shape == (0, 5)
    *_, gweights = passes.hidden_gradient(nothing, nothing, None, torch.empty(0), index, index, "silu")
    assert gweights.shape == (0,)
    unused.zero_unused(torch.empty(0, 2, 3), index)
