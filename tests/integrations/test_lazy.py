"""Lazy tensors against tensors: any box of what operations make of them."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.integrations.transformers.lazy import LazyTensor

OPERATIONS = {
    "mT": lambda t: t.mT,
    "transpose": lambda t: torch.transpose(t, dim0=0, dim1=2),
    "stack": lambda t: torch.stack([t, t[:, :, :]], dim=1),
    "cat": lambda t: torch.cat([t, t[:, 1:3], t[:, :0]], dim=1),
    "chunk": lambda t: torch.chunk(t, 2, dim=2)[1],
    "split": lambda t: torch.split(t, [1, 4], dim=1)[1],
    "unsqueeze and squeeze": lambda t: t.unsqueeze(1).unsqueeze(-1).squeeze(1),
    "interleaved": lambda t: torch.stack([t, t.contiguous()], dim=3).flatten(2),
    "flat": lambda t: t.flatten(0),
    "every third": lambda t: t[..., 1::3],
    "slices": lambda t: t[1:, ..., :4],
    "cast": lambda t: t.mT.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_boxes(name):
    t = torch.arange(3 * 5 * 7, dtype=torch.float32).view(3, 5, 7)
    lazy = OPERATIONS[name](LazyTensor(t.shape, t.dtype, lambda box: t[box]))
    expected = OPERATIONS[name](t)
    assert lazy.shape == expected.shape
    assert lazy.dtype == expected.dtype
    assert torch.equal(lazy.read(), expected)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ends = [sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in expected.shape]
        box = tuple(slice(start, stop) for start, stop in ends)
        assert torch.equal(lazy.read(box), expected[box]), box
        for dtype in (lazy.dtype, torch.float64):
            for order in itertools.permutations(range(expected.ndim)):  # which dim is the last in memory
                out = (
                    expected[box]
                    .permute(order)
                    .to(dtype, copy=True)
                    .permute(tuple(map(order.index, range(len(order)))))
                )
                out.fill_(torch.nan)
                lazy.read_into(out, box)
                assert torch.equal(out, expected[box].to(dtype)), box


@pytest.mark.parametrize(("dim", "copies"), [(2, 0), (1, 4)])
def test_every_leaf_is_copied_into_its_place(dim, copies):
    """Columns of a leaf that lie apart are put together before they are transposed, one leaf at a time."""
    weights = torch.randn(6, 4, 5)
    lazy = torch.stack([LazyTensor([4, 5], w.dtype, lambda box, w=w: w[box]).mT for w in weights]).chunk(2, dim)[0]
    _, rows, columns = lazy.shape
    out = torch.empty(4, rows, columns)
    with Allocations() as made:
        lazy.read_into(out, (slice(1, 5), slice(0, rows), slice(0, columns)))
    assert torch.equal(out, weights.mT[1:5, :rows, :columns])
    assert made.names == ["aten.clone.default"] * copies


class Allocations(TorchDispatchMode):
    """The operations that return new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(returned.alias_info for returned in func._schema.returns):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_it_does_not_know_is_named():
    lazy = LazyTensor([2, 3], torch.float32, lambda box: torch.zeros(2, 3)[box])
    with pytest.raises(NotImplementedError, match=r"torch.cumsum does not take a LazyTensor; use one of cat, chunk"):
        torch.cumsum(lazy, 0)
    with pytest.raises(NotImplementedError, match="cannot be indexed by"):
        lazy[0]
    with pytest.raises(ValueError, match=r"cannot concatenate LazyTensor\(\[2, 2\].* along dim 0"):
        torch.cat([lazy, lazy[:, :2]])
