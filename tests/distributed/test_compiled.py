"""torch.compile(fullgraph=True) of a parallelized layer: the gradients of one process."""

import copy

import pytest
import torch
import torch.distributed as dist

import moesaic
from tests.distributed.parity import assert_close, assert_gradients_close, meshes_of

pytestmark = pytest.mark.slow

CONFIG = moesaic.MoEConfig(
    dim=8, hidden_dim=6, num_experts=5, top_k=2, shared_hidden_dim=4, expert_biases=True, score_bias=True
)
# As many tokens each time, on all ranks together. In the last, one expert gets nearly all, and a rank may get none.
LENGTHS = (6, 9, 14)


def check(layout: dict[str, int], compute: str) -> None:
    meshes = meshes_of(layout)
    torch.manual_seed(0)
    plain = moesaic.MoE(CONFIG)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = moesaic.parallelize(copy.deepcopy(plain), meshes, compute=compute)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for step, length in enumerate(LENGTHS):
        for moe in (plain, layer):
            moe.zero_grad()
            moe.router.bias[:2] = 9.0 * (step == 2)
        whole = torch.randn(length, 8, requires_grad=True)
        plain(whole).square().sum().backward()
        slices = torch.arange(length).tensor_split(dist.get_world_size())
        mine = slices[dist.get_rank()]
        x = whole.detach()[mine].requires_grad_()
        run(x).square().sum().backward()
        assert_gradients_close(layer, {n: p.grad for n, p in plain.named_parameters()}, f", step {step}")
        assert_close(f"input gradient, step {step}", x.grad, whole.grad[mine])
    assert torch.equal(moesaic.expert_load(layer)["router"], plain.router.load)


@pytest.mark.parametrize(
    ("layout", "compute"),
    [
        pytest.param({"tp": 2, "ep": 2}, "local", marks=pytest.mark.long),
        ({"ep": 2}, "dtensor"),
        ({"tp": 2, "etp": 2}, "dtensor"),
    ],
    ids=["tp2 ep2 local", "dp2 ep2 dtensor", "tp2 etp2 dtensor"],
)
def test_a_whole_graph(same_ranks, layout, compute):
    same_ranks(check, 2, layout, compute)


def check_refusals() -> None:
    layer = moesaic.parallelize(moesaic.MoE(CONFIG), meshes_of({}))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="FSDP's hooks run between compiled parts.* edp 1"):
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(3, 8))
    # In parts it works.
    assert torch.compile(layer, backend="eager")(torch.randn(3, 8)).shape == (3, 8)


def test_hooks_of_fsdp_around_the_experts_are_not_compiled(same_ranks):
    same_ranks(check_refusals, 2)
