"""Initial weights: numbers by position, and what cannot be initialised so."""

import math

import pytest
import torch
from torch import Tensor, nn

import moesaic
from moesaic.layers import init_weights_
from moesaic.layers.blocks import BLOCK, fill_by_position

CONFIG = moesaic.MoEConfig(
    dim=16, hidden_dim=24, num_experts=6, top_k=2, expert_biases=True, shared_hidden_dim=8, bias_update_speed=0.1
)


def filled(
    box: tuple[slice, ...], shape: tuple[int, ...], key: str = "0 w", dtype: torch.dtype = torch.float32
) -> Tensor:
    local = torch.full([s.stop - s.start for s in box], math.nan, dtype=dtype)
    fill_by_position(local, box, torch.Size(shape), key, lambda block, generator: block.normal_(generator=generator))
    return local


def test_a_part_has_the_numbers_of_the_whole():
    shape = (3, 700, 401)  # a few blocks, whose ends are anywhere
    whole = filled(tuple(slice(0, n) for n in shape), shape)
    assert whole.numel() > 3 * BLOCK
    for box in (
        ((1, 3), (0, 700), (0, 401)),
        ((0, 3), (350, 700), (0, 401)),
        ((0, 3), (10, 10), (0, 401)),
        (
            (2, 3),
            (1, 699),
            (400, 401),
        ),
    ):
        part = tuple(slice(*ends) for ends in box)
        assert torch.equal(filled(part, shape), whole[part])
    assert abs(whole.mean()) < 5 / math.sqrt(whole.numel())
    assert abs(whole.std() - 1) < 5 / math.sqrt(2 * whole.numel())
    assert len(whole.unique()) > 0.95 * whole.numel()


def test_keys_and_dtypes():
    box = (slice(0, 5), slice(0, 4))
    assert not torch.equal(filled(box, (5, 4), "0 w"), filled(box, (5, 4), "1 w"))
    assert torch.equal(filled(box, (5, 4), dtype=torch.bfloat16), filled(box, (5, 4)).bfloat16())
    assert filled((), ()).ndim == 0


def test_modules_say_which_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 16, padding_idx=3), nn.LayerNorm(16), moesaic.MoE(CONFIG), nn.Linear(16, 4))
    before = torch.get_rng_state()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    moe = model[2]
    moe.router.load.fill_(7)
    assert init_weights_(model) is model
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[1].weight, torch.ones(16))
    assert not moe.experts.b1.any()
    assert not moe.router.load.any()
    assert not model[0].weight[3].any()
    assert model[0].padding_idx == 3
    assert 0.9 < model[0].weight.std() < 1.1
    assert 0.018 < moe.experts.w1.std() < 0.022
    assert model[3].weight.abs().max() <= 1 / math.sqrt(16)
    first = {name: p.clone() for name, p in model.named_parameters()}
    init_weights_(model, std=0.5, seed=1)
    assert 0.45 < model[2].shared.w1.weight.std() < 0.55
    assert 0.45 < moe.experts.w1.std() < 0.55
    assert not model[0].weight[3].any()
    init_weights_(nn.ModuleDict({"_orig_mod": model}))  # as torch.compile names it
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())


class Draws(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.how = how

    def reset_parameters(self) -> None:
        with torch.no_grad():
            match self.how:
                case "data":
                    self.weight.data.uniform_(2, 3)
                case "others":
                    self.weight.copy_(torch.randperm(12).view(4, 3))
                case "computed":
                    self.weight.copy_(torch.empty_like(self.weight).uniform_(1, 2).neg_())
                case "part":
                    self.weight[0].normal_()


def test_what_cannot_be_by_position():
    init_weights_(model := Draws("data"))
    assert model.weight.min() >= 2
    init_weights_(model := nn.Sequential(Draws("computed"), Draws("computed")))
    assert model[0].weight.max() <= -1
    assert not torch.equal(model[0].weight, model[1].weight)
    for how in ("others", "part"):
        with pytest.raises(
            ValueError, match=r"'0' \(Draws\) draws random numbers by aten.*use only normal_ and uniform_ of whole"
        ):
            init_weights_(nn.Sequential(Draws(how)))
    with pytest.raises(ValueError, match=r"no module sets \['0.weight'\]"):
        init_weights_(nn.Sequential(Draws("nothing")))
    with pytest.raises(ValueError, match="'router.weight' is on the meta device"):
        init_weights_(moesaic.MoE(CONFIG, device="meta"))
    with pytest.raises(ValueError, match="std: must be at least 0, got -1"):
        init_weights_(moesaic.MoE(CONFIG), std=-1.0)
