"""The input gradient of gate and up is a sum of two products in one loop: a descriptor has both rows, or weights."""

import pytest
import torch
from torch import Tensor

from moesaic.ops.triton import available
from tests.ops.oracle import uninitialised_memory_is_nan

matmul, pairs, maps, configs = (available.load(name) for name in ("matmul", "pairs", "maps", "configs"))
E, K, N = 3, 40, 48


def beside_each_other(in_order: bool, *shape: int) -> tuple[Tensor, Tensor]:
    """Two tensors of one allocation, the second behind the first or before it, with NaN between them."""
    g = torch.Generator().manual_seed(sum(shape))
    whole = torch.full((3, *shape), torch.nan, dtype=torch.bfloat16)
    whole[::2] = torch.randint(-4, 5, (2, *shape), generator=g)
    before, _, behind = whole
    return (before, behind) if in_order else (behind, before)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("x_in_order", "w_in_order"), [(True, True), (True, False), (False, True)])
def test_both_products_are_added(on, monkeypatch, x_in_order, w_in_order, transposed):
    on("9.0")
    taken = []
    kernel = matmul.as_pair
    monkeypatch.setattr(matmul, "as_pair", lambda *args: taken.append(kernel(*args)) or taken[-1])
    sizes = torch.tensor([[70, 0, 33]])
    x1, x2 = beside_each_other(x_in_order, 110, K)
    w1, w2 = beside_each_other(w_in_order, E, *((N, K) if transposed else (K, N)))
    if transposed:
        w1, w2 = w1.mT, w2.mT
    products = matmul.Product(x1, w1), matmul.Product(x2, w2)
    groups = maps.group_bounds(sizes, len(x1), E)
    config = configs.Config(32, 32, 16, GROUP_M=2, specialized=True)
    with configs.using("matmul", config), uninitialised_memory_is_nan():
        y = matmul.grouped_mm(products[0], groups, torch.bfloat16, plus=products[1])
    expected = torch.zeros(len(x1), N)
    for e, (start, end) in enumerate([(0, 70), (70, 70), (70, 103)]):
        expected[start:end] = sum(p.x[start:end].float() @ p.w[e].float() for p in products)
    assert torch.equal(y, expected.to(torch.bfloat16))
    assert [pair.first for pair in taken] == [int(not x_in_order), int(not w_in_order)]


def test_tensors_that_lie_or_look_otherwise_are_no_pair():
    a, b = beside_each_other(True, E, K, N)
    assert pairs.can_pair(a, b)
    assert pairs.can_pair(b, a)
    # The same one, another layout, another dtype.
    assert not pairs.can_pair(a, a)
    assert not pairs.can_pair(a, b.mT.contiguous().mT)
    assert not pairs.can_pair(a, b.half())


def test_a_pair_has_no_other_bits_than_two_loops(on):
    on("9.0")
    g = torch.Generator().manual_seed(0)
    x1, x2, w1, w2 = (torch.randn(shape, generator=g).bfloat16() for shape in [(64, K)] * 2 + [(E, K, N)] * 2)
    groups = maps.group_bounds(torch.tensor([[30, 30, 4]]), 64, E)
    found = []
    for specialized in (True, False):
        with configs.using("matmul", configs.Config(32, 32, 16, specialized=specialized)):
            first, second = matmul.Product(x1, w1), matmul.Product(x2, w2)
            found.append(matmul.grouped_mm(first, groups, torch.bfloat16, plus=second))
    assert torch.equal(*found)
