"""sort_by_expert against a plain Python model; permute, combine and their gradients against an fp64 oracle.

Legend: T tokens, K copies a token, R rows, D model dim, E experts.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.ops import combine, permute, sort_by_expert
from tests.ops.oracle import HALF, uninitialised_memory_is_nan
from tests.ops.permute_oracle import Problem, check, problem, run
from tests.ops.strategies import DTYPES

ops = torch.ops.moesaic
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)


def model(ids: list[list[int]], num_experts: int, num_rows: int) -> tuple[list[int], list[list[int]], list[int]]:
    """What sort_by_expert has to return, in plain Python."""
    copies = [(e, t, k) for t, row in enumerate(ids) for k, e in enumerate(row) if 0 <= e < num_experts]
    K = len(ids[0]) if ids else 0
    slots = [t * K + k for _, t, k in sorted(copies)]
    positions = [
        [slots.index(t * K + k) if 0 <= e < num_experts else -1 for k, e in enumerate(row)] for t, row in enumerate(ids)
    ]
    sizes = [sum(e == expert for e, _, _ in copies) for expert in range(num_experts)]
    return slots + [-1] * (num_rows - len(slots)), positions, sizes


@st.composite
def routings(draw: st.DrawFn, max_tokens: int = 12) -> tuple[Tensor, int]:
    """Ids ``[T, K]``, some of no expert, and E."""
    T, K, E = draw(st.integers(0, max_tokens)), draw(st.integers(0, 4)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(("mixed", "one expert", "none")))
    expert = {
        "mixed": st.integers(-2, E + 2),
        "one expert": st.just(draw(st.integers(0, E - 1))),
        "none": st.sampled_from((-1, E)),
    }[kind]
    ids = draw(st.lists(st.lists(expert, min_size=K, max_size=K), min_size=T, max_size=T))
    return torch.tensor(ids, dtype=torch.int64).reshape(T, K), E


@given(routings(), st.integers(0, 5), st.sampled_from(INDEX_DTYPES))
def test_sort_is_that_of_the_model(routing, padding, dtype):
    ids, E = routing
    R = ids.numel() + padding
    slots, positions, sizes = model(ids.tolist(), E, R)
    with uninitialised_memory_is_nan():
        permutation = sort_by_expert(ids.to(dtype), E, num_rows=R)
    assert permutation.slots.tolist() == slots
    assert permutation.positions.tolist() == positions
    assert permutation.group_sizes.tolist() == sizes
    assert {t.dtype for t in permutation} == {torch.int64}


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
def test_more_experts_than_the_type_of_the_ids_counts(dtype):
    permutation = sort_by_expert(torch.tensor([[1, 0], [127, 3]]).to(dtype), 300)
    assert permutation.slots.tolist() == [1, 0, 3, 2]
    assert permutation.group_sizes.nonzero().flatten().tolist() == [0, 1, 3, 127]


def test_sort_is_stable_at_length():
    ids = torch.randint(0, 3, (2000, 4), generator=torch.Generator().manual_seed(0))
    slots = sort_by_expert(ids, 3).slots
    same = ids.flatten()[slots].diff() == 0
    assert (slots.diff()[same] > 0).all()


def test_fewer_rows_than_copies_where_some_are_not_here():
    ids = torch.tensor([[0, 5], [-1, 1]])
    permutation = sort_by_expert(ids, 2, num_rows=2)
    assert permutation.slots.tolist() == [0, 3]
    assert permutation.positions.tolist() == [[0, -1], [-1, 1]]


@settings(max_examples=3 * settings().max_examples)
@given(
    routing=routings(),
    D=st.sampled_from((0, 1, 3, 8)),
    dtype=st.sampled_from(DTYPES),
    weights=st.sampled_from((None, "same", torch.float32)),
    padding=st.integers(0, 3),
    exact=st.booleans(),
    strides=st.sampled_from(("contiguous", "transposed", "sliced", "stepped")),
    seed=st.integers(0, 2**16),
)
def test_values(routing, D, dtype, weights, padding, exact, strides, seed):
    ids, E = routing
    permutation = sort_by_expert(ids, E, num_rows=ids.numel() + padding)
    weights_dtype = dtype if weights == "same" else weights
    # An fp64 result has no oracle but where it is exact.
    exact = exact or torch.float64 in (dtype, weights_dtype)
    p = problem(
        permutation,
        D,
        dtype,
        weighted=weights is not None,
        weights_dtype=weights_dtype,
        exact=exact,
        strides=strides,
        seed=seed,
    )
    with uninitialised_memory_is_nan():
        results = run(p)
    if p.weights is not None:
        assert results.gw_permute.dtype == results.gw_combine.dtype == p.weights.dtype
    assert {t.dtype for t in (results.permuted, results.gx, results.combined, results.gy)} == {dtype}
    check(p, results, exact=exact)


ROUTING = torch.tensor([[2, 0], [0, 9], [-1, 3], [2, 2], [-1, -1]])


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_accuracy_of_long_sums(dtype):
    # Copies enough, and rows long enough, for sums in half precision to stand out.
    generator = torch.Generator().manual_seed(0)
    permutation = sort_by_expert(torch.randint(-1, 9, (6, 64), generator=generator), 8, num_rows=400)
    p = problem(permutation, 500, dtype, exact=False)
    check(p, run(p), exact=False)


def test_combine_undoes_permute():
    # Every token has one copy: what is there comes back bit for bit.
    ids = torch.randint(0, 5, (50, 1), generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 7)
    permutation = sort_by_expert(ids, 5, num_rows=60)
    assert torch.equal(combine(permute(x, permutation), permutation), x)
    y = torch.randn(50, 7)
    permutation = sort_by_expert(ids, 5)
    assert torch.equal(permute(combine(y, permutation), permutation), y)


def test_shares_of_a_token_add_up_to_it():
    permutation = sort_by_expert(torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), 4)
    x, shares = torch.arange(16.0).view(2, 8), torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 2)
    assert torch.equal(combine(permute(x, permutation, shares), permutation), x)
    assert torch.equal(combine(permute(x, permutation), permutation, shares), x)


def test_tokens_without_copies_and_padding_rows_are_zero():
    permutation = sort_by_expert(ROUTING, 4, num_rows=8)
    x, weights = torch.ones(5, 3), torch.ones(5, 2)
    assert permute(x, permutation, weights).any(1).tolist() == [True] * 6 + [False] * 2
    assert combine(torch.ones(8, 3), permutation, weights).any(1).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_absent_copies_read_nothing(poison):
    # No token has a copy here, so row 0 is padding; the first token, row 0's neighbour in memory, is poisoned too.
    nothing = sort_by_expert(torch.full((3, 2), -1), 4, num_rows=2)
    bad = torch.full((1, 4), poison)
    x, y = torch.cat([bad, torch.ones(2, 4)]), torch.cat([bad, torch.ones(1, 4)])
    p = Problem(nothing, x, y, torch.full((3, 2), poison), y.clone(), x.clone())
    for result in run(p):
        assert not result.any()

    # Row 0 holds a copy, an Inf one: it is its token's alone.
    permutation = sort_by_expert(torch.tensor([[0], [-1], [1], [-1]]), 2, num_rows=4)
    y = torch.cat([bad, torch.ones(3, 4)])
    assert combine(y, permutation).isfinite().all(1).tolist() == [False, True, True, True]
    gw = ops.combine_weight_grad(y, torch.ones(4, 4), permutation.slots, permutation.positions)
    assert gw.isfinite().flatten().tolist() == [False, True, True, True]
    # And token 0, which padding rows look at, is its rows' alone.
    x = torch.cat([bad, torch.ones(3, 4)])
    assert permute(x, permutation).isfinite().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_call_same_bits(dtype):
    ids = torch.randint(-1, 9, (700, 8), generator=torch.Generator().manual_seed(0))
    p = problem(sort_by_expert(ids, 8, num_rows=6000), 96, dtype, exact=False)
    first = run(p)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(p), strict=True))
