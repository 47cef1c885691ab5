"""The interface of grouped_gemm gives what its own reference gives: loops over groups, index_select and index_copy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moesaic.compat.grouped_gemm as grouped_gemm
from moesaic.compat.grouped_gemm import ops


def products(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
    groups = zip(a.split(batch_sizes.tolist()), b.mT if trans_b else b, strict=True)
    return torch.cat([rows @ w for rows, w in groups])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("sizes", [[128] * 8, [0, 300, 1, 211]], ids=["fixed", "variable"])
def test_gmm_and_its_gradients(sizes, trans_b, dtype):
    torch.manual_seed(0)
    batch_sizes, (k, n) = torch.tensor(sizes), (128, 136)
    a = torch.randn(sum(sizes), k, dtype=dtype, requires_grad=True)
    b = torch.randn(len(sizes), *((n, k) if trans_b else (k, n)), dtype=dtype, requires_grad=True)
    exact_a, exact_b = (t.detach().double().requires_grad_() for t in (a, b))
    y, exact = ops.gmm(a, b, batch_sizes, trans_b), products(exact_a, exact_b, batch_sizes, trans_b)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact.backward(grad.double())
    # Sums in fp32 or wider, rounded once: half an ulp of the result, and a little for sums near zero.
    eps = torch.finfo(dtype).eps
    for actual, expected in ((y, exact), (a.grad, exact_a.grad), (b.grad, exact_b.grad)):
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=eps * 1e-3 * expected.abs().max().item())


def test_trans_a_is_the_gradient_of_a_weight():
    torch.manual_seed(0)
    a, b = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    batch_sizes = torch.tensor([2, 0, 7])
    expected = torch.stack([x.mT @ y for x, y in zip(a.split([2, 0, 7]), b.split([2, 0, 7]), strict=True)])
    torch.testing.assert_close(grouped_gemm.backend.gmm(a, b, batch_sizes, trans_a=True), expected)
    c = torch.empty_like(expected)
    assert grouped_gemm.backend.gmm(a, b, batch_sizes, trans_a=True, c=c) is c
    torch.testing.assert_close(c, expected)


def test_all_groups_may_be_empty():
    a, b = torch.randn(0, 4, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    y = ops.gmm(a, b, torch.zeros(3, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 5)
    assert b.grad is not None
    assert not b.grad.any()


def test_the_example_of_its_readme():
    indices = torch.tensor([[1, 2], [0, 1], [0, 2], [1, 2]], dtype=torch.int32)
    x = torch.arange(4.0).unsqueeze(1).expand(4, 4)
    rows, row_id_map = ops.permute(x, indices)
    assert row_id_map.tolist() == [2, 0, 1, 4, 5, 3, 6, 7]
    assert row_id_map.dtype == torch.int32
    assert rows[:, 0].tolist() == [1, 2, 0, 1, 3, 0, 2, 3]
    assert ops.unpermute(rows, row_id_map, torch.ones(4, 2)).equal(2 * x)


@given(st.integers(1, 9), st.integers(1, 8), st.integers(1, 3), st.integers(0, 30), st.randoms(use_true_random=False))
def test_permute_and_unpermute_with_gradients(tokens, experts, copies, dropped, random):
    copies = min(copies, experts)
    torch.manual_seed(random.randrange(1 << 30))
    indices = torch.stack([torch.randperm(experts)[:copies] for _ in range(tokens)]).to(torch.int32)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(tokens, copies, dtype=torch.float64, requires_grad=True)
    kept = max(tokens * copies - dropped, 1)
    slots = torch.argsort(indices.flatten(), stable=True)[:kept]

    rows, row_id_map = ops.permute(x, indices, num_out_tokens=kept)
    expected_rows = x.index_select(0, slots // copies)
    assert rows.equal(expected_rows)
    z = ops.unpermute(rows, row_id_map, probs)
    weighted = expected_rows * probs.flatten()[slots].unsqueeze(1)
    expected = torch.zeros_like(x).index_add(0, slots // copies, weighted)
    torch.testing.assert_close(z, expected)

    grad = torch.randn_like(z)
    actual_grads = torch.autograd.grad(z, (x, probs), grad)
    for actual, right in zip(actual_grads, torch.autograd.grad(expected, (x, probs), grad), strict=True):
        torch.testing.assert_close(actual, right)


def test_one_copy_a_token():
    x, indices = torch.randn(5, 3), torch.tensor([2, 0, 2, 1, 0])
    rows, row_id_map = ops.permute(x, indices)
    assert ops.unpermute(rows, row_id_map).equal(x)


def test_no_tokens():
    x = torch.empty(0, 3, requires_grad=True)
    rows, row_id_map = ops.permute(x, torch.empty(0, 2, dtype=torch.int32))
    assert row_id_map is None
    assert ops.unpermute(rows, row_id_map, torch.empty(0, 2)).shape == (0, 3)


def test_what_is_not_here_says_so():
    with pytest.raises(NotImplementedError, match=r"sinkhorn: .* route with moesaic\.TopKRouter"):
        ops.sinkhorn_kernel(torch.ones(2, 2))
    eight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="input_act: dtype torch.float8_e4m3fn is not supported; cast it"):
        ops.permute(eight, torch.zeros(4, 1, dtype=torch.int32))
    with pytest.raises(TypeError, match="a: dtype torch.float8_e4m3fn"):
        ops.gmm(eight, eight.unsqueeze(0), torch.tensor([4]))
    with pytest.raises(ValueError, match="trans_a, trans_b: both are set"):
        grouped_gemm.backend.gmm(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([1]), trans_a=True, trans_b=True)
    with pytest.raises(ValueError, match=r"indices: expected \[4, K\]"):
        ops.permute(torch.ones(4, 4), torch.zeros(3, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"probs: expected T \* K = 4 values"):
        ops.unpermute(torch.ones(4, 4), torch.arange(4), torch.ones(3, 1))
