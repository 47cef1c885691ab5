"""Thirty of torch's own operators, under DTensor's own rules: no false alarm."""

import pytest
import torch

from tests.sharding.planted import no_false_alarm, random

pytestmark = pytest.mark.usefixtures("unchecked")  # several times as fast

aten = torch.ops.aten
x, other, square, cube = random(13, 12), random(13, 12, seed=1), random(12, 12), random(4, 6, 5)
scale, bias, mask = random(12), random(12, seed=2), random(13, 12) > 0
rows = torch.tensor([3, 0, 11, 5, 5, 8, 2])
columns = torch.randint(12, (13, 5), generator=torch.Generator().manual_seed(0))

CALLS = {
    "abs": (aten.abs.default, x),
    "exp": (aten.exp.default, x),
    "neg": (aten.neg.default, x),
    "relu": (aten.relu.default, x),
    "sigmoid": (aten.sigmoid.default, x),
    "tanh": (aten.tanh.default, x),
    "gelu": (aten.gelu.default, x),
    "silu": (aten.silu.default, x),
    "clone": (aten.clone.default, x),
    "t": (aten.t.default, x),
    "unsqueeze": (aten.unsqueeze.default, x, 1),
    "cumsum": (aten.cumsum.default, x, 1),
    "softmax": (aten._softmax.default, x, 1, False),
    "log_softmax": (aten._log_softmax.default, x, 1, False),
    "sum": (aten.sum.dim_IntList, x, [1]),
    "mean": (aten.mean.dim, x, [0]),
    "argmax": (aten.argmax.default, x, 1),
    "transpose": (aten.transpose.int, cube, 0, 2),
    "slice": (aten.slice.Tensor, x, 1, 2, 9),
    "embedding": (aten.embedding.default, x, rows),
    "index_select": (aten.index_select.default, x, 0, rows),
    "gather": (aten.gather.default, x, 1, columns),
    "add": (aten.add.Tensor, x, other),
    "mul": (aten.mul.Tensor, x, other),
    "sub": (aten.sub.Tensor, x, other),
    "div": (aten.div.Tensor, x, other),
    "maximum": (aten.maximum.default, x, other),
    "where": (aten.where.self, mask, x, other),
    "mm": (aten.mm.default, x, square),
    "bmm": (aten.bmm.default, cube, random(4, 5, 3)),
    "addmm": (aten.addmm.default, bias, x, square),
    "native_layer_norm": (aten.native_layer_norm.default, x, [12], scale, bias, 1e-5),
}
# The others take longer.
QUICK = ["exp", "t", "cumsum", "sum", "mean", "embedding", "mul", "mm"]


@pytest.mark.parametrize("name", QUICK)
def test_nothing_is_wrong(name):
    no_false_alarm(*CALLS[name], axes=(2,), meshes=[], backward=False)


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_wrong_on_more_ranks_nor_in_gradients(name):
    no_false_alarm(*CALLS[name], axes=(2, 3), meshes=[(2, 2)])
