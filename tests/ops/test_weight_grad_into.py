"""Weight gradients added to what a buffer holds, by the CPU kernels."""

import pytest
import torch

from moesaic.ops.grouped_mm.groups import as_blocks
from moesaic.ops.grouped_mm.impl import cpu, reference
from tests.ops.cpu_isa import HERE, needs_kernels, use
from tests.ops.strategies import layout, problem

pytestmark = needs_kernels

BF16 = torch.bfloat16


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("dtype", "into_dtype"), [(torch.float32, torch.float32), (BF16, BF16), (BF16, torch.float32)])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (33, 70), (300, 128), (64, 577)])
@pytest.mark.parametrize("form", ["flat", "own", "shared"])
def test_it_adds(isa, dtype, into_dtype, K, N, form, monkeypatch):
    # Integers, so that each sum is exact in fp32, and what a bf16 buffer gets is one rounding.
    use(monkeypatch, isa)
    p = problem(layout(form, [[70, 0, 3], [0, 0, 41]], slack=2), K, N, dtype)
    sizes = as_blocks(p.group_sizes)
    E = p.w.shape[0]
    before = torch.arange(E * K * N).view(E, K, N).remainder(17).to(into_dtype)
    x, grad = p.x.nan_to_num(0.0), p.grad.nan_to_num(0.0)
    sums = reference.weight_grad(x.float(), grad.float(), sizes, E)
    into = before.clone()
    cpu.weight_grad_into(into, x, grad, sizes)
    assert torch.equal(into, (before.float() + sums).to(into_dtype))


def test_a_result_that_is_written_around_the_caches():
    # More than 8 MB, and an expert without rows between two with some.
    p = problem(layout("flat", [[5, 0, 9]]), 1024, 1024, torch.float32)
    into = torch.full((3, 1024, 1024), 3.0)
    cpu.weight_grad_into(into, p.x, p.grad, as_blocks(p.group_sizes))
    expected = reference.weight_grad(p.x, p.grad, as_blocks(p.group_sizes), 3) + 3
    assert torch.equal(into, expected)


def test_an_fp32_buffer_keeps_what_bf16_would_lose():
    x, grad, sizes = torch.ones(1, 1, dtype=BF16), torch.ones(1, 1, dtype=BF16), torch.tensor([[1]])
    into = torch.full((1, 1, 1), 1024.0)
    for _ in range(3):
        cpu.weight_grad_into(into, x, grad, sizes)
    assert into.item() == 1027
