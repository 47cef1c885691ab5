"""What docs/routing.md promises of a token's bits.

With the CPU kernels the order of a batch does not change them, and inside `batch_invariant()` nothing does.
"""

import pytest
import torch

import moesaic
from moesaic.ops import batch_invariant, experts_mlp, grouped_mm
from moesaic.ops.invariant import ROWS
from tests.ops.cpu_isa import each_isa_and_dtype, needs_kernels, use


@needs_kernels
@each_isa_and_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_order_does_not_change_bits(monkeypatch, isa, dtype, transposed):
    use(monkeypatch, isa)
    E, K, D, F = 5, 2, 72, 40
    generator = torch.Generator().manual_seed(0)
    w1, w3, w2 = (torch.randn(E, *s, generator=generator).to(dtype) for s in ((D, F), (D, F), (F, D)))
    if transposed:
        w1, w3, w2 = (w.mT.contiguous().mT for w in (w1, w3, w2))
    # Groups of a few rows and of hundreds, and the last expert idle.
    for T in (3, 40, 700):
        x, weights = torch.randn(T, D, generator=generator).to(dtype), torch.rand(T, K, generator=generator)
        ids = torch.rand(T, E - 1, generator=generator).topk(K).indices
        y = experts_mlp(x, ids, weights, w1, w3, w2, impl="cpu")
        order = torch.randperm(T, generator=generator)
        shuffled = experts_mlp(x[order], ids[order], weights[order], w1, w3, w2, impl="cpu")
        assert torch.equal(shuffled, y[order]), T
        # Other tokens may be others.
        others = torch.where(torch.arange(T).unsqueeze(1) == 0, x, -x)
        assert torch.equal(experts_mlp(others, ids, weights, w1, w3, w2, impl="cpu")[0], y[0]), T


def operands(T, dtype, transposed, D=72, F=41, E=5, K=2):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(E, *s, generator=generator).to(dtype) for s in ((D, F), (D, F), (F, D))]
    if transposed:
        weights = [w.mT.contiguous().mT for w in weights]
    x, topk_weights = torch.randn(T, D, generator=generator).to(dtype), torch.rand(T, K, generator=generator)
    # The last expert is idle.
    ids = torch.rand(T, E - 1, generator=generator).topk(K).indices
    return (x, ids, topk_weights), weights


@pytest.mark.parametrize(
    ("dtype", "transposed", "activation"),
    [
        (torch.float32, True, "silu"),
        (torch.float32, False, "gelu_tanh"),
        (torch.bfloat16, False, "silu"),
        (torch.bfloat16, True, "gelu"),
    ],
    ids=str,
)
def test_one_switch_makes_results_the_same_in_every_batch(dtype, transposed, activation):
    """In any split, in any order, among any others: at sizes that no vector divides, too."""
    T = 3 * ROWS + 3
    tokens, weights = operands(T, dtype, transposed)

    def experts(which):
        return experts_mlp(*(t[which] for t in tokens), *weights, activation=activation)

    with batch_invariant():
        y = experts(slice(None))
        for size in (1, 7, ROWS, 50):
            parts = [experts(slice(start, start + size)) for start in range(0, T, size)]
            assert torch.equal(torch.cat(parts), y), size
        order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
        assert torch.equal(experts(order), y[order])
    # It is the same product.
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2.0}
    torch.testing.assert_close(y, experts(slice(None)), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_in_the_switch(dtype):
    """Router and experts; ``E`` is odd, and so are the dims."""
    torch.manual_seed(0)
    moe = moesaic.MoE(moesaic.MoEConfig(dim=23, hidden_dim=21, num_experts=5, top_k=2)).to(dtype).eval()
    x = torch.randn(2 * ROWS + 1, 23).to(dtype)
    with batch_invariant():
        y = moe(x)
        assert all(torch.equal(torch.cat([moe(part) for part in x.split(size)]), y) for size in (1, 13, ROWS))
    with torch.no_grad():
        torch.testing.assert_close(y, moe(x), rtol=1e-2, atol=1e-2)


def test_gradients_under_the_switch_are_those_of_the_definition():
    tokens, weights = operands(77, torch.float64, False)
    leaves = [tokens[0], tokens[2].double(), *weights]
    leaves = [t.clone().requires_grad_() for t in leaves]

    def gradients(**options):
        y = experts_mlp(leaves[0], tokens[1], leaves[1], *leaves[2:], **options)
        return torch.autograd.grad(y.square().sum(), leaves)

    expected = gradients(impl="reference")
    with batch_invariant():
        actual = gradients()
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-8)


def test_what_cannot_be_promised_is_refused():
    x, w, sizes = torch.randn(3, 8), torch.randn(2, 8, 4), torch.tensor([2, 1])
    with batch_invariant():
        assert torch.equal(grouped_mm(x, w, sizes)[2:], grouped_mm(x[2:], w, torch.tensor([0, 1])))
        with pytest.raises(
            ValueError, match="impl: got 'reference', and inside batch_invariant.. only 'torch' or None"
        ):
            grouped_mm(x, w, sizes, impl="reference")
