"""Experts over two ranks that add the gradients of their weights to buffers of the local shapes."""

import copy

import pytest
import torch
import torch.distributed as dist

import moesaic
from moesaic.parallel.placements import WEIGHTS

NAMES = ("w1", "w3", "w2")
STEPS, T = 3, 6


def layers(layout: dict[str, int], way: str) -> tuple[moesaic.MoE, moesaic.MoE]:
    torch.manual_seed(0)
    # Not a number of experts, nor of hidden dims, that two ranks share evenly.
    plain = moesaic.MoE(moesaic.MoEConfig(dim=16, hidden_dim=7, num_experts=5, top_k=2))
    meshes = moesaic.build_meshes(**layout, device_type="cpu")
    return plain, moesaic.parallelize(copy.deepcopy(plain), meshes, compute=way)


def check_sums(layout: dict[str, int]) -> None:
    plain, moe = layers(layout, "local")
    weights = {name: getattr(moe.experts, name) for name in NAMES}
    start = 2.0
    buffers = {name: torch.full_like(w.to_local(), start) for name, w in weights.items()}
    moe.experts.main_grads = tuple(buffers.values())
    rank, size = dist.get_rank(), dist.get_world_size()
    for _ in range(STEPS):
        x = torch.randn(size * T, 16)  # the same on every rank, as the seed is
        plain(x).square().sum().backward()
        moe(x.view(size, T, 16)[rank]).square().sum().backward()
    mesh = weights["w1"].device_mesh
    for name, w in weights.items():
        assert w.grad is None, name
        expected = torch.distributed.tensor.distribute_tensor(getattr(plain.experts, name).grad, mesh, WEIGHTS[name])
        torch.testing.assert_close(buffers[name] - start, expected.to_local(), rtol=1e-4, atol=1e-5)
    # What is no expert's weight has its gradient as ever.
    gate = moe.router.weight.grad
    torch.testing.assert_close(gate.full_tensor(), plain.router.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}, {"ep": 2}], ids=str)
def test_buffers_of_the_local_shapes_accumulate(same_ranks, layout):
    same_ranks(check_sums, 2, layout)


def check_refusal() -> None:
    _, moe = layers({"tp": 2, "ep": 2}, "dtensor")
    local = [getattr(moe.experts, name).to_local() for name in NAMES]
    whole = [getattr(moe.experts, name) for name in NAMES]
    for like in (local, whole):
        moe.experts.main_grads = tuple(torch.zeros_like(w, requires_grad=False) for w in like)
        with pytest.raises(TypeError, match='main_grads: .* w1 .* is a DTensor; .*parallelize.*compute="local"'):
            moe(torch.randn(T, 16))


def test_on_dtensors_it_says_what_to_do(same_ranks):
    same_ranks(check_refusal, 2)


def check_shape() -> None:
    plain, moe = layers({"tp": 2, "ep": 2}, "local")
    moe.experts.main_grads = tuple(torch.zeros_like(getattr(plain.experts, name)) for name in NAMES)
    with pytest.raises(ValueError, match=r"main_grads: the buffer for w1 is \[5, 16, 7\]; give \[[23], 16, 7\]"):
        moe(torch.randn(T, 16))


def test_buffers_of_the_whole_shapes_are_refused(same_ranks):
    same_ranks(check_shape, 2)
