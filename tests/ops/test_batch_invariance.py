"""What docs/routing.md promises of a token's bits: with the CPU kernels the order of a batch does not change them."""

import pytest
import torch

from moesaic.ops import experts_mlp
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
