"""Right rules of kernels of many kinds: no false alarm."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.sharding import planted
from tests.sharding.planted import ONE, PAIR, TWO, no_false_alarm, random, ruled

pytestmark = pytest.mark.usefixtures("unchecked")  # several times as fast

x = random(12, 13)
IDS = "(Tensor x, Tensor ids) -> Tensor"
numbers = torch.complex(x, x.flip(0))


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rows_of_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


def total_cross_entropy(x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty(()) if x.device.type == "meta" else F.cross_entropy(x, ids, reduction="sum")


def heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, -1)).softmax(-1).flatten(1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


# By name: the operator with its rule, and inputs.
CALLS = {
    "RMS norm in fp32": (ruled(TWO, rms_norm, "m n!, n! -> m n", linear=["w"]), x, random(13)),
    "rotary embedding": (
        ruled(
            "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
            rotary,
            "b s d!, s e!, s e! -> b s d!",
            linear=["x", ("cos", "sin")],
        ),
        *(random(5, 12, 6), random(12, 3), random(12, 3, seed=1)),
    ),
    "gate": (ruled(TWO, lambda a, b: F.silu(a) * b, "m n, m n -> m n", linear=["w"]), x, random(12, 13, seed=1)),
    "attention": (
        ruled(
            "(Tensor q, Tensor k, Tensor v) -> Tensor",
            attention,
            "b h s d!, b h t! d!, b h t! e -> b h s e",
            linear=["v"],
        ),
        *(random(2, 4, 6, 5), random(2, 4, 7, 5), random(2, 4, 7, 3)),
    ),
    "top k": (ruled("(Tensor x, int k) -> Tensor", lambda x, k: x.topk(k, 1).values, "m n! -> m j!"), x, 4),
    "cross-entropy, summed": (ruled(IDS, total_cross_entropy, "m v!, m -> "), random(12, 7), torch.arange(12) * 5 % 7),
    "int8 rows": (ruled(PAIR, rows_of_int8, "m n! -> m n!, m 1"), x),
    "sort": (ruled(PAIR, lambda x: tuple(t.clone() for t in x.sort(1)), "m n! -> m n!, m n!"), x),
    "gather": (
        ruled(
            IDS,
            lambda x, ids: x.gather(1, ids),
            "m n!, m j -> m j",
            linear=["x"],
            preserves={"max": ["x"], "min": ["x"]},
        ),
        x,
        torch.arange(60).view(12, 5) * 7 % 13,
    ),
    "log of a sum of exponentials": (ruled(ONE, lambda x: x.logsumexp(1), "m n! -> m"), x),
    "bags of an embedding": (
        ruled(IDS, lambda x, ids: x[ids].sum(1), "v! d, t k -> t d", linear=["x"]),
        random(9, 5),
        torch.arange(36).view(12, 3) * 5 % 9,
    ),
    "outer product": (
        ruled(TWO, lambda a, b: a[:, None] * b, "m, n -> m n", linear=["x", "w"]),
        random(12),
        random(13),
    ),
    "bf16 product": (
        ruled(TWO, planted.matmul, "m k, k n -> m n", linear=["x", "w"]),
        x.bfloat16(),
        random(13, 14).bfloat16(),
    ),
    "cast to fp8": (ruled(ONE, lambda x: x.to(torch.float8_e4m3fn).to(x.dtype), "m n -> m n"), x),
    "heads": (ruled("(Tensor x, int heads) -> Tensor", heads, "m n! -> m n!"), random(12, 12), 3),
    "dropout with a mask": (
        ruled(
            "(Tensor x, Tensor mask, float p=0.5) -> Tensor",
            lambda x, mask, p=0.5: x * mask / (1 - p),
            "m n, m n -> m n",
            linear=["x"],
        ),
        x,
        random(12, 13, seed=3) > 0,
    ),
    "norm": (ruled("(Tensor x, int p) -> Tensor", lambda x, p: x.abs().pow(p).sum(1), "m n -> m"), x, 2),
    "index of the largest": (ruled(ONE, lambda x: x.argmax(1), "m n! -> m"), x),
    "complex product": (ruled(TWO, torch.mul, "m n, m n -> m n", linear=["x", "w"]), numbers, numbers.flip(1)),
}
# The others take longer.
QUICK = ["top k", "int8 rows", "heads", "norm", "cast to fp8"]


@pytest.mark.parametrize("name", QUICK)
def test_nothing_is_wrong(name):
    no_false_alarm(*CALLS[name], axes=(2,), meshes=[], backward=False)


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_wrong_on_more_ranks(name):
    no_false_alarm(*CALLS[name], axes=(2, 3), meshes=[(2, 2)])
