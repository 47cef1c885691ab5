"""What `parallelize` accepts and refuses, and what the layer it returns takes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import moesaic
from moesaic.parallel import Meshes, resolve_layout

CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2, shared_hidden_dim=4)
BIASED = replace(CONFIG, expert_biases=True, logit_bias=True)
FOUR = {"tp": 2, "ep": 2, "etp": 2}


def make(way: str = "dtensor", config: moesaic.MoEConfig = CONFIG) -> tuple[moesaic.MoE, Meshes]:
    torch.manual_seed(0)
    meshes = moesaic.build_meshes(**FOUR, device_type="cpu")
    moe = moesaic.MoE(config)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    return moesaic.parallelize(moe, meshes, compute=way), meshes


def check_weights() -> None:
    torch.manual_seed(0)
    plain = moesaic.MoE(BIASED)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    moe, _ = make(config=BIASED)
    placements = {"w1": (Shard(0), Shard(2)), "w3": (Shard(0), Shard(2)), "w2": (Shard(0), Shard(1))}
    placements |= {"b1": (Shard(0), Shard(1)), "b3": (Shard(0), Shard(1)), "b2": (Shard(0), Replicate())}
    for name, expected in placements.items():
        weight = getattr(moe.experts, name)
        assert isinstance(weight, DTensor)
        assert weight.placements == expected
        assert weight.device_mesh.mesh_dim_names == ("ep", "etp")
        local = weight.to_local(grad_placements=expected)
        assert local.untyped_storage().nbytes() == local.numel() * local.element_size()
        assert torch.equal(weight.full_tensor(), getattr(plain.experts, name))


def test_experts_are_dtensors_over_both_axes(same_ranks):
    same_ranks(check_weights, 4)


def check_rank_0_wins() -> None:
    meshes = moesaic.build_meshes(**FOUR, device_type="cpu")
    torch.manual_seed(torch.distributed.get_rank())
    moe = moesaic.parallelize(moesaic.MoE(CONFIG), meshes)
    torch.manual_seed(0)
    plain = moesaic.MoE(CONFIG)
    for (name, p), q in zip(moe.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q), name


def test_parameters_are_those_of_rank_0(same_ranks):
    same_ranks(check_rank_0_wins, 4)


def run(way: str) -> list[torch.Tensor]:
    moe, _ = make(way, BIASED)
    torch.manual_seed(1 + torch.distributed.get_rank())
    x = torch.randn(7, 8, requires_grad=True)
    y = moe(x)
    y.square().sum().backward()
    grads = [p.grad.redistribute(placements=p.placements) for p in moe.parameters()]
    return [y.detach(), x.grad, *(g.to_local(grad_placements=g.placements) for g in grads)]


def check_ways_agree() -> None:
    for a, b in zip(run("dtensor"), run("local"), strict=True):
        assert torch.equal(a, b)


def test_both_ways_give_the_same_bits(same_ranks):
    same_ranks(check_ways_agree, 4)


def check_dtensor_input() -> None:
    moe, meshes = make()
    torch.manual_seed(1)
    x = torch.randn(3, 5, 8)
    mesh = meshes.dense["tp"]
    sharded = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
    y = moe(sharded)
    assert isinstance(y, DTensor)
    assert (y.placements, y.shape) == ((Shard(1),), x.shape)
    y.full_tensor().square().sum().backward()

    torch.manual_seed(0)
    plain = moesaic.MoE(CONFIG)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    x.requires_grad_()
    expected = plain(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y.full_tensor(), expected)
    assert sharded.grad.placements == (Shard(1),)
    torch.testing.assert_close(sharded.grad.full_tensor(), x.grad)
    # Both data-parallel ranks saw the same tokens, and gradients are sums.
    for (name, p), q in zip(moe.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), 2 * q.grad, msg=name)

    for wrong in (Replicate(), Shard(2), Partial()):
        with pytest.raises(
            ValueError, match=r"x: tokens must be sharded .* x.redistribute\(placements=\[Shard\(1\)\]\)"
        ):
            moe(DTensor.from_local(x.detach(), mesh, [wrong]))


def test_tokens_may_be_a_dtensor(same_ranks):
    same_ranks(check_dtensor_input, 4)


def fake_meshes(world_size: int, **sizes: int) -> Meshes:
    """Layout checks come before anything touches a mesh."""
    return Meshes(resolve_layout(world_size, **sizes))


def test_refusals_name_the_size_and_the_remedy(unchecked):
    moe = moesaic.MoE(CONFIG)
    with pytest.raises(ValueError, match=r"ep: 8 ranks cannot share 4 experts; for 'MoE' choose one of \[1, 2, 4\]"):
        moesaic.parallelize(moe, fake_meshes(8, ep=8))
    with pytest.raises(ValueError, match=r"etp: 8 ranks cannot share 6 hidden dims; .* one of \[1, 2\]"):
        moesaic.parallelize(moe, fake_meshes(8, etp=8))
    with pytest.raises(ValueError, match=r"etp: the last of 4 ranks would have none of 6 .* edp 2 .* one of \[1, 2\]"):
        moesaic.parallelize(moe, fake_meshes(8, etp=4))
    five = moesaic.MoE(replace(CONFIG, num_experts=5))
    with pytest.raises(ValueError, match=r"ep: the last of 4 ranks would have none of 5 .* edp 2 .* one of \[1, 2\]"):
        moesaic.parallelize(five, fake_meshes(8, ep=4))
    odd = moesaic.MoE(replace(CONFIG, num_experts=5, dim=9))
    with pytest.raises(ValueError, match=r"2 does not divide 5 experts, .* dim 9, which edp 4 .* one of \[1\]"):
        moesaic.parallelize(odd, fake_meshes(8, ep=2))
    biased = moesaic.MoE(replace(CONFIG, num_experts=5, expert_biases=True))
    with pytest.raises(ValueError, match=r"2 does not divide the 5 experts of 'MoE', whose biases .* or edp 1"):
        moesaic.parallelize(biased, fake_meshes(8, ep=2))
    with pytest.raises(ValueError, match="no moesaic.MoE layer.*swap_moe"):
        moesaic.parallelize(nn.Linear(3, 3), fake_meshes(1))
    with pytest.raises(ValueError, match="tp > 1 works for .* not for Sequential; use tp=1"):
        moesaic.parallelize(nn.Sequential(moe), fake_meshes(2, tp=2))
    half = moesaic.MoE(CONFIG)
    half.router.to("meta")
    with pytest.raises(ValueError, match="'router.weight' is on the meta device and others are not"):
        moesaic.parallelize(half, fake_meshes(1))
    with pytest.raises(ValueError, match="compute: got 'tensor'; choose 'dtensor' or 'local'"):
        moesaic.parallelize(moe, fake_meshes(1), compute="tensor")


def check_only_once() -> None:
    moe, meshes = make()
    with pytest.raises(ValueError, match="is already a DTensor"):
        moesaic.parallelize(moe, meshes)


def test_a_model_is_parallelized_once(same_ranks):
    same_ranks(check_only_once, 4)


class Tower(nn.Module):
    """Some model of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(moesaic.MoE(CONFIG) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def check_tower() -> None:
    torch.manual_seed(0)
    plain = Tower()
    torch.manual_seed(0)
    tower = moesaic.parallelize(Tower(), moesaic.build_meshes(ep=2, etp=2, device_type="cpu"))
    x = torch.randn(8, 8)
    rank = torch.distributed.get_rank()
    tower(x[2 * rank : 2 * rank + 2]).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, p), q in zip(tower.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)


def test_any_model_with_moe_layers_is_taken_without_tp(same_ranks):
    same_ranks(check_tower, 4)
