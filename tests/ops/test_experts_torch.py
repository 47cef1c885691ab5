"""experts_mlp and grouped_mm by torch's products: what a call costs beside the products."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.ops import experts_mlp
from moesaic.ops.experts_mlp import implementations
from moesaic.ops.grouped_mm.implementations import IMPLEMENTATIONS as GROUPED


class Operations(TorchDispatchMode):
    """Counts what torch runs inside an operator's implementation, which is called below the dispatcher."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def operations_of(num_experts: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of a forward and a backward pass in which two experts have rows."""
    torch.manual_seed(0)
    w1, w3 = (torch.randn(num_experts, 4, 6, requires_grad=True) for _ in range(2))
    w2, x = torch.randn(num_experts, 6, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    weights = torch.rand(3, 2, requires_grad=True)
    ids = torch.tensor([[1, num_experts - 2]]).expand(3, 2)
    total: dict[str, int] = {}
    module = implementations.IMPLEMENTATIONS["torch"].module

    def counted(function):
        def call(*args: object, **kwargs: object) -> object:
            with Operations() as operations:
                result = function(*args, **kwargs)
            for name, count in operations.counts.items():
                total[name] = total.get(name, 0) + count
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(module, name, counted(getattr(module, name)))
        experts_mlp(x, ids, weights, w1, w3, w2, impl="torch").sum().backward()
    assert isinstance(x.grad, Tensor)
    return total


def test_experts_without_rows_cost_no_operations(monkeypatch):
    few, many = (operations_of(num_experts, monkeypatch) for num_experts in (8, 300))
    assert few == many
    # A pass reads the number of copies, and three values for its check of the sizes.
    assert sum(count for name, count in few.items() if "_local_scalar_dense" in name) <= 8
    # Three projections forward, three gradients of inputs, three of weights: for two experts.
    assert few["aten.mm.out"] == 2 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [16, 15])
@pytest.mark.parametrize("transposed", [False, True])
def test_many_groups_are_the_same_sums(dtype, columns, transposed, monkeypatch):
    """torch's own loop, where it takes the operands, gives the bits of ours; and the tail is zero."""
    E, K, torch_impl = 80, 24, GROUPED["torch"].module
    torch.manual_seed(0)
    sizes = torch.randint(1, 4, (E,))
    sizes[::7] = 0
    rows = int(sizes.sum())
    x, grad = torch.randn(rows + 3, K).to(dtype), torch.randn(rows + 3, columns).to(dtype)
    w = torch.randn(E, columns, K).to(dtype).mT if transposed else torch.randn(E, K, columns).to(dtype)
    sizes_1E, calls = sizes.unsqueeze(0), []

    def counted(*args, **kwargs):
        calls.append(args)
        return library(*args, **kwargs)

    def both() -> list[Tensor]:
        y = torch_impl.forward(x, w, sizes_1E, dtype)
        return [y, torch_impl.weight_grad(x, grad, sizes_1E, E), torch_impl.forward(grad, w.mT, sizes_1E, dtype)]

    library = torch._grouped_mm
    monkeypatch.setattr(torch_impl, "_FEW_ROWS", 0)
    monkeypatch.setattr(torch, "_grouped_mm", counted)
    found = both()
    # Rows of 15 elements are aligned in no dtype.
    assert len(calls) == (3 if dtype != torch.float64 and columns == 16 else transposed and dtype != torch.float64)
    monkeypatch.setattr(torch_impl, "_MANY_GROUPS", E + 1)
    calls.clear()
    for ours, theirs in zip(found, both(), strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)
    assert calls == []
    assert not found[0][rows:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_rows_meet_copies_of_small_matrices(dtype, transposed, monkeypatch):
    """In one call for all groups of a size; larger ones among them have calls of their own."""
    E, K, N, torch_impl = 150, 24, 15, GROUPED["torch"].module
    torch.manual_seed(0)
    half = dtype.itemsize == 2
    sizes = torch.randint(0, 8 if half else 3, (E,))
    sizes[5] = 40
    rows = int(sizes.sum())
    x, grad = torch.randn(rows + 3, K).to(dtype), torch.randn(rows + 3, N).to(dtype)
    w = torch.randn(E, N, K).to(dtype).mT if transposed else torch.randn(E, K, N).to(dtype)
    calls = []

    def all_three() -> list[Tensor]:
        y = torch_impl.forward(x, w, sizes.unsqueeze(0), dtype)
        gx = torch_impl.forward(grad, w.mT, sizes.unsqueeze(0), dtype)
        return [y, gx, torch_impl.weight_grad(x, grad, sizes.unsqueeze(0), E)]

    library = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: calls.append(args) or library(*args))
    monkeypatch.setattr(torch_impl, "_COPIED_BYTES", 10 * K * N * dtype.itemsize)
    found = all_three()
    # For each size 10 groups at a time; in half types also in the weight gradient.
    at_once = sum(math.ceil(n / 10) for size, n in enumerate(sizes.bincount().tolist()) if 0 < size < 40)
    assert len(calls) == at_once * (3 if half else 2)
    calls.clear()
    monkeypatch.setattr(torch_impl, "_MANY_GROUPS", E + 1)
    for ours, theirs in zip(found, all_three(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)
    assert calls == []
    assert not found[0][rows:].any()
    assert not found[1][rows:].any()
