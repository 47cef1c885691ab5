"""The override `moe` on one process, against moesaic's own layer: routing, balance losses, masks, counters."""

import importlib

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.layers import attach_balance_losses

pytest.importorskip("torchtitan")

titan = importlib.import_module("moesaic.integrations.torchtitan")

B, L, D, E, F, K = 3, 5, 8, 6, 4, 2


def config_of(*, groups: int | None = None, force: bool = False, bias: float | None = 1e-3, lora: bool = False):
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    return MoE.Config(
        num_experts=E,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
            token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=E, top_k=K),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=E,
            gate=Linear.Config(in_features=D, out_features=E),
            top_k=K,
            score_func="sigmoid",
            route_norm=True,
            route_scale=1.5,
            num_expert_groups=groups,
            num_limited_groups=None if groups is None else 2,
            _debug_force_load_balance=force,
        ),
        load_balance_coeff=bias,
    )


def filled(layer):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name, buffer in layer.named_buffers():
        buffer.copy_(torch.linspace(-0.2, 0.2, E) if name == "expert_bias_E" else torch.zeros(E))
    return layer


def ours(layer, config: moesaic.MoEConfig) -> moesaic.MoE:
    """moesaic's layer with the weights of torchtitan's."""
    moe = moesaic.MoE(config)
    experts = layer.routed_experts.inner_experts
    with torch.no_grad():
        moe.router.weight.copy_(layer.router.gate.weight)
        moe.router.bias.copy_(layer.expert_bias_E)
        for mine, theirs in ((moe.experts.w1, experts.w1_EFD), (moe.experts.w3, experts.w3_EFD)):
            mine.copy_(theirs.mT)
        moe.experts.w2.copy_(experts.w2_EDF.mT)
    return moe


def gradients(layer, x_BLD: Tensor, *more: Tensor) -> list[Tensor]:
    x = x_BLD.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, *more)
    (y * torch.linspace(-1, 1, D)).sum().backward()
    return [y, x.grad]


@pytest.mark.parametrize("aux_loss", ["batch", "sequence"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_losses_and_masks_are_those_of_our_layer(aux_loss, masked):
    losses = {"aux_loss": aux_loss, "aux_loss_coef": 0.3, "z_loss_coef": 0.2}
    layer = filled(titan.moe(config_of(groups=3), forwards_per_step=4, **losses).build())
    routing = {"score": "sigmoid", "route_scale": 1.5, "num_groups": 3, "top_groups": 2, "score_bias": True}
    moe = ours(layer, moesaic.MoEConfig(dim=D, hidden_dim=F, num_experts=E, top_k=K, **routing, **losses))
    attach_balance_losses(moe, 1 / 4)
    x_BLD = torch.randn(B, L, D)
    mask_BL = torch.arange(L) < torch.tensor([[5], [2], [0]])
    expected = gradients(moe, x_BLD, *[mask_BL] * masked)
    if masked:
        with titan.token_mask(layer, mask_BL):
            got = gradients(layer, x_BLD)
        assert (got[0][~mask_BL] == 0).all()
    else:
        got = gradients(layer, x_BLD)
    experts = layer.routed_experts.inner_experts
    got += [layer.router.gate.weight.grad, experts.w1_EFD.grad.mT, experts.w3_EFD.grad.mT, experts.w2_EDF.grad.mT]
    expected += [moe.router.weight.grad, moe.experts.w1.grad, moe.experts.w3.grad, moe.experts.w2.grad]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    # torchtitan moves the bias by these, and padding is not among them.
    assert torch.equal(layer.tokens_per_expert_E, moe.router.load.float())
    assert layer.tokens_per_expert_E.sum() == K * (7 if masked else B * L)


def test_without_losses_it_is_torchtitans_own_layer(monkeypatch):
    from torchtitan.models.common.moe import GroupedExperts

    def in_fp32(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        rows = x_RD.split(counts_E.tolist())
        weights = zip(self.w1_EFD, self.w3_EFD, self.w2_EDF, strict=True)
        return torch.cat(
            [(torch.nn.functional.silu(r @ a.T) * (r @ b.T)) @ c.T for r, (a, b, c) in zip(rows, weights, strict=True)]
        )

    monkeypatch.setattr(GroupedExperts, "forward", in_fp32)
    x_BLD = torch.randn(B, L, D)
    for options in ({}, {"groups": 3}, {"bias": None}, {"force": True}):
        stock = filled(config_of(**options).build())
        layer = filled(titan.moe(config_of(**options)).build())
        assert {n: p.shape for n, p in stock.state_dict().items()} == {
            n: p.shape for n, p in layer.state_dict().items()
        }
        for mine, theirs in zip(gradients(layer, x_BLD), gradients(stock, x_BLD), strict=True):
            torch.testing.assert_close(mine, theirs)
        for (name, mine), theirs in zip(layer.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda said, name=name: f"{name}: {said}")
        assert torch.equal(layer.tokens_per_expert_E, stock.tokens_per_expert_E)


def test_the_gate_computes_in_fp32():
    layer = filled(titan.moe(config_of()).build()).bfloat16()
    x_BLD = torch.randn(B, L, D).bfloat16()
    expected = x_BLD.float() @ layer.router.gate.weight.float().T
    assert torch.equal(layer.router.gate(x_BLD), expected)
    assert layer(x_BLD).dtype == torch.bfloat16


def test_another_number_of_forward_passes_is_an_error_in_the_first_step():
    layer = filled(titan.moe(config_of(), z_loss_coef=0.1, forwards_per_step=2).build())
    optimizer = torch.optim.SGD(layer.parameters())
    for _ in range(3):
        torch.utils.checkpoint.checkpoint(layer, torch.randn(B, L, D), use_reentrant=False).sum().backward()
    with pytest.raises(ValueError, match="forwards_per_step: the first step had 3 .* divided by 2; .*=3, the steps of"):
        optimizer.step()


def test_what_lora_froze_stays_frozen_and_its_gate_stays():
    from torchtitan.components.lora import LoRAConverter

    for targets, adapted in ((None, True), (["wq"], False)):
        config = LoRAConverter(LoRAConverter.Config(rank=2, target_modules=targets)).convert(config_of())
        layer = filled(titan.moe(config, z_loss_coef=0.1).build())
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == {f"router.gate.lora_{x}.weight" for x in "ab" if adapted}
        x_BLD = torch.randn(B, L, D, requires_grad=True)
        layer(x_BLD).sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is not None} == trained


def test_masks_are_refused_by_name():
    layer = filled(titan.moe(config_of()).build())
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor \[B, L\], got torch.int64 \[3, 5\]"):
        titan.token_mask(layer, torch.ones(B, L, dtype=torch.int64)).__enter__()
    with (
        titan.token_mask(layer, torch.ones(B, L + 1, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"mask: \[3, 6\] does not fit the 3 sequences of 5 tokens"),
    ):
        layer(torch.randn(B, L, D))
    with pytest.raises(ValueError, match="no layer of it can be masked; .*moesaic.integrations.torchtitan.moe"):
        titan.token_mask(torch.nn.Linear(1, 1), torch.ones(B, L, dtype=torch.bool)).__enter__()
