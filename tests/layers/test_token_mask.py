"""Padding: a layer computes with a mask what it computes without the padded tokens."""

import pytest
import torch
from torch import Tensor

import moesaic
from tests.layers import naive

BATCH, LENGTH = 3, 9
EVERYTHING = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01, "bias_update_speed": 0.1, "shared_hidden_dim": 4}
VARIANTS = {
    "softmax": {},
    "sigmoid, a gated dense expert": {"score": "sigmoid", "shared_gate": True},
    "biases": {"logit_bias": True, "expert_biases": True},
    "weighed inputs": {"weigh_inputs": True, "top_k": 1, "normalize_top_k": False},
}
MASKS = {
    "right": torch.arange(LENGTH) < torch.tensor([[9], [4], [1]]),
    "left": torch.arange(LENGTH) >= torch.tensor([[0], [6], [9]]),
    "scattered": torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.6,
    "none": torch.ones(BATCH, LENGTH, dtype=torch.bool),
}


def results(layer: moesaic.MoE, x: Tensor, *mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    x = x.clone().requires_grad_()
    with moesaic.balance_losses() as losses:
        y = layer(x, *mask)
    total = (y * torch.arange(1, 7)).sum() + sum(losses)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = dict(zip([*names, "x"], torch.autograd.grad(total, [*parameters, x]), strict=True))
    return y.detach(), torch.stack(losses).detach(), gradients, layer.router.load.clone()


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_without_the_padded_tokens(variant, where):
    mask, x = MASKS[where], naive.tokens(BATCH, LENGTH, 6)
    options = EVERYTHING | VARIANTS[variant]
    y, losses, gradients, load = results(naive.make(**options), x[mask])
    # Whatever stands there, and as ints too, as tokenizers give it.
    padded = x.masked_fill(~mask.unsqueeze(2), torch.nan)
    got = results(naive.make(**options), padded, mask.long() if where == "left" else mask)
    torch.testing.assert_close(got[0][mask], y)
    assert not got[0][~mask].any()
    torch.testing.assert_close(got[1], losses)
    torch.testing.assert_close(got[2].pop("x")[mask], gradients.pop("x"))
    torch.testing.assert_close(got[2], gradients)
    assert torch.equal(got[3], load)


@pytest.mark.parametrize("impl", ["reference", "torch", "cpu"])
def test_nothing_but_padding(impl):
    x = naive.tokens(BATCH, LENGTH, 6, dtype=torch.float32)
    layer = naive.make(torch.float32, **EVERYTHING)
    layer.experts.impl = impl
    y, losses, gradients, load = results(layer, x, torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    assert not any(t.any() for t in [y, losses, load, *gradients.values()])


def test_padding_has_no_expert():
    layer = naive.make()
    ids, weights = layer.router(naive.tokens(3, 6), torch.tensor([True, False, True]))[:2]
    assert ids[1].tolist() == [-1] * 3
    assert weights[1].tolist() == [0.0] * 3
    assert (ids[::2] >= 0).all()


def test_a_mask_that_does_not_fit(unchecked):
    layer, x = naive.make(), naive.tokens(2, 5, 6)
    with pytest.raises(ValueError, match=r"token_mask: expected \[2, 5\], one value for each token .*got \[2, 4\]"):
        layer(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"token_mask: expected a tensor of bools or .*torch.float32; use .* != 0"):
        layer(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match="token_mask: expected a tensor of bools or integers, got list"):
        layer(x, [[1] * 5] * 2)
