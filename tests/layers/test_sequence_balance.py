"""The balance loss of each sequence by itself, by its formula in plain Python."""

import pytest
import torch
from torch import Tensor

import moesaic
from tests.layers import naive

E, K = 8, 3
SEQUENCE = {"aux_loss_coef": 0.1, "aux_loss": "sequence"}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def by_the_formula(layer: moesaic.MoE, x: Tensor, mask: Tensor) -> Tensor:
    """DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20, and the mean over sequences that are not empty."""
    losses = []
    for tokens in [sequence[here] for sequence, here in zip(x, mask, strict=True) if here.any()]:
        T = len(tokens)
        logits = tokens @ layer.router.weight.T
        s = logits.softmax(1) if layer.config.score == "softmax" else logits.sigmoid()
        chosen = [sorted(range(E), key=row.__getitem__)[-K:] for row in s.tolist()]
        f = [E / (K * T) * sum(e in row for row in chosen) for e in range(E)]
        P = (s / s.sum(1, keepdim=True)).mean(0)
        losses.append(sum(f[e] * P[e] for e in range(E)))
    return sum(losses) / len(losses)


def loss_of(layer: moesaic.MoE, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with moesaic.balance_losses() as losses:
        layer(x, mask)
    assert len(losses) == 1
    return losses[0]


@pytest.mark.parametrize(
    "options", [{}, {"score": "sigmoid", "bias_update_speed": 0.1, "num_groups": 4, "top_groups": 2}]
)
@pytest.mark.parametrize("mask", [torch.ones_like(MASK), MASK], ids=["whole", "padded"])
def test_by_its_formula(options, mask):
    layer, x = naive.make(**SEQUENCE, **options), naive.tokens(4, 6, 6)
    loss, expected = loss_of(layer, x, mask), 0.1 * by_the_formula(layer, x, mask)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(t, layer.router.weight)[0] for t in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_tokens_without_sequences_are_one():
    layer, x = naive.make(**SEQUENCE), naive.tokens(6, 6)
    torch.testing.assert_close(loss_of(layer, x), loss_of(layer, x.unsqueeze(0)))
    whole = naive.make(aux_loss_coef=0.1)
    torch.testing.assert_close(loss_of(layer, x), loss_of(whole, x))


def test_without_a_token():
    layer = naive.make(**SEQUENCE)
    for x, mask in ((naive.tokens(2, 3, 6), torch.zeros(2, 3, dtype=torch.bool)), (torch.ones(0, 3, 6).double(), None)):
        assert loss_of(layer, x, mask).item() == 0
