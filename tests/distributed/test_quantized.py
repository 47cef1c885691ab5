"""Quantised experts over four ranks: one process's results and gradients, its bytes, and its checkpoints."""

import copy

import pytest
import torch
import torch.distributed as dist

import moesaic
from moesaic import checkpoint
from moesaic.checkpoint.state import training_state
from moesaic.layers import quantize_
from moesaic.layers.lora import ExpertsAdapter, Rank, add_adapter
from tests.distributed.parity import assert_close, meshes_of, whole

T, D, F = 6, 64, 128
LAYOUTS = [{"ep": 2, "etp": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 4}]  # of five experts, so unevenly


def layer(format: str, hidden_dim: int = F, rank: int = 0) -> moesaic.MoE:
    torch.manual_seed(0)
    config = moesaic.MoEConfig(dim=D, hidden_dim=hidden_dim, num_experts=5, top_k=2, expert_biases=True)
    moe = moesaic.MoE(config)
    for bias in (moe.experts.b1, moe.experts.b3, moe.experts.b2):
        torch.nn.init.normal_(bias)
    quantize_(moe, format)
    if rank:
        ranks = {weight: Rank(rank, 2.0) for weight in ("w1", "w3", "w2")}
        add_adapter(moe.experts, "default", ExpertsAdapter(moe.experts, ranks))
        for factor in moe.experts.adapters.parameters():
            torch.nn.init.normal_(factor, std=0.1)
        for bias in (moe.experts.b1, moe.experts.b3, moe.experts.b2):
            bias.requires_grad_(False)
    return moe


def check_parity(format: str, hidden_dim: int, layout: dict[str, int], way: str, rank: int = 0) -> None:
    plain = layer(format, hidden_dim, rank)
    moe = moesaic.parallelize(copy.deepcopy(plain), meshes_of(layout), compute=way)
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(size * T, D)  # the same on every rank, as the seed is
    leaf, mine = x.clone().requires_grad_(), x.view(size, T, D)[rank].clone().requires_grad_()
    expected = plain(leaf)
    expected.square().sum().backward()
    y = moe(mine)
    y.square().sum().backward()
    assert_close("y", y, expected.view(size, T, D)[rank])
    assert_close("gradient of x", mine.grad, leaf.grad.view(size, T, D)[rank])
    for (name, p), q in zip(moe.named_parameters(), plain.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        if p.requires_grad:
            assert_close(f"gradient of {name}", whole(p.grad), q.grad)
    for name, buffer in moe.named_buffers():
        if name.startswith("experts."):
            assert torch.equal(whole(buffer), plain.get_buffer(name)), name
    # Whole tensors can be loaded.
    state = {name: whole(t) for name, t in moe.state_dict().items()}
    moe.load_state_dict({name: torch.zeros_like(t) if ".w1.scales" in name else t for name, t in state.items()})
    assert not whole(moe.experts.w1.scales).any()


CASES = [
    *[(format, F, layout, "dtensor") for format, layout in zip(("int8", "nf4", "mxfp4"), LAYOUTS, strict=True)],
    ("nf4", F, LAYOUTS[0], "local"),
    ("int8", 7, LAYOUTS[1], "local"),
    ("nf4", 24, {}, "local"),  # w2's blocks run over the ends of rows, and edp is 4
]


@pytest.mark.parametrize(("format", "hidden_dim", "layout", "way"), CASES, ids=str)
def test_parity(same_ranks, format, hidden_dim, layout, way):
    same_ranks(check_parity, 4, format, hidden_dim, layout, way)


@pytest.mark.parametrize(("format", "layout", "way"), [("nf4", LAYOUTS[0], "dtensor"), ("mxfp4", LAYOUTS[1], "local")])
def test_parity_under_adapters(same_ranks, format, layout, way):
    same_ranks(check_parity, 4, format, F, layout, way, 3)


def check_bytes_and_checkpoint(folder: str) -> None:
    saved = moesaic.parallelize(layer("nf4"), meshes_of({"ep": 2, "etp": 2}))
    plain, x = layer("nf4"), torch.randn(T, D)
    local = sum(b.to_local().untyped_storage().nbytes() for n, b in saved.named_buffers() if n.startswith("experts."))
    most = 3 * D * F * 3 * 2 // 2  # in bf16, of the rank with three experts, each of which two ranks share
    assert 0 < local <= 0.30 * most
    checkpoint.save(folder, 1, training_state(saved, torch.optim.SGD(saved.parameters())), {})
    other = layer("nf4")
    for buffer in other.experts.buffers():
        buffer.zero_()
    loaded = moesaic.parallelize(other, meshes_of({"tp": 2, "ep": 4}))
    state = training_state(loaded, torch.optim.SGD(loaded.parameters()))
    checkpoint.load(folder, state)
    checkpoint.restore(loaded, torch.optim.SGD(loaded.parameters()), state)
    assert_close("y", loaded(x), plain(x))


def test_bytes_and_checkpoints(same_ranks, tmp_path):
    same_ranks(check_bytes_and_checkpoint, 4, str(tmp_path))


def check_refusals() -> None:
    cases = (
        (
            "nf4",
            192,
            {"etp": 2},
            "dtensor",
            r"etp: 2 ranks cannot share evenly the 3 blocks of 64 \(nf4\)",
        ),
        (
            "nf4",
            24,
            {"etp": 2},
            "local",
            r"'MoE.w2' has blocks of 64 .* of rows of 24, so only",
        ),
        ("nf4", 24, {"ep": 4}, "dtensor", "so no rule lays them over a mesh; use etp 1 and compute='local'"),
    )
    for format, hidden_dim, layout, way, match in cases:
        with pytest.raises(ValueError, match=match):
            moesaic.parallelize(layer(format, hidden_dim), meshes_of(layout), compute=way)
    moe = moesaic.MoE(moesaic.MoEConfig(dim=D, hidden_dim=F, num_experts=4, top_k=2))
    with pytest.raises(ValueError, match=r"'experts.w1' is a DTensor; call quantize_ before parallelize"):
        quantize_(moesaic.parallelize(copy.deepcopy(moe), meshes_of({"ep": 2})), "nf4")
    # FSDP over experts that have no parameters left.
    x = torch.randn(T, D)
    quantize_(moe, "nf4")
    assert_close("y", moesaic.parallelize(copy.deepcopy(moe), meshes_of({"ep": 2}))(x).detach(), moe(x).detach())


def test_refusals(same_ranks):
    same_ranks(check_refusals, 4)
