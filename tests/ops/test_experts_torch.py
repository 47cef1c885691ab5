"""experts_mlp and grouped_mm by torch's products: what a call costs beside the products."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.ops import experts_mlp
from moesaic.ops.experts_mlp import implementations


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
