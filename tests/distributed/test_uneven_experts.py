"""Experts, and their hidden dims, that do not divide by the axes: the last ranks have fewer, or none."""

import copy

import pytest
import torch
from torch.optim import AdamW
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic import checkpoint
from moesaic.checkpoint.state import restore, training_state
from moesaic.integrations.transformers import swap_moe, to_transformers_state_dict
from tests.distributed.parity import whole
from tests.distributed.test_moe_parity import Sizes, check_layout, name_of

FIVE = Sizes(experts=5, hidden=7)

LAYOUTS = [
    (2, {"tp": 2, "ep": 2}),
    (4, {"tp": 4, "ep": 4}),  # 2, 2, 1 and no experts
    (4, {"tp": 2, "ep": 2, "etp": 2}),
    (4, {"tp": 2, "etp": 2}),
    (8, {"tp": 2, "ep": 4, "etp": 2}),
    (8, {"tp": 2, "dp_replicate": 2, "ep": 2}),  # and FSDP over 4
]


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=name_of)
def test_layout(equal_gradients, world_size, layout):
    # FSDP would have to cut the biases unevenly over two axes.
    sizes = FIVE._replace(biases="dp_replicate" not in layout)
    check_layout(equal_gradients, world_size, layout, 3, sizes)


def test_layout_without_gate(equal_gradients):
    check_layout(equal_gradients, 4, {"tp": 2, "ep": 2, "etp": 2}, 3, FIVE._replace(gated=False))


def make(layout: dict[str, int], seed: int, num_experts: int) -> tuple[moesaic.MoE, moesaic.MoE, AdamW]:
    """A layer, the same one in parallel, and its optimizer."""
    torch.manual_seed(seed)
    plain = moesaic.MoE(moesaic.MoEConfig(dim=16, hidden_dim=7, num_experts=num_experts, top_k=2))
    moe = moesaic.parallelize(copy.deepcopy(plain), moesaic.build_meshes(**layout, device_type="cpu"))
    return plain, moe, AdamW(moe.parameters(), lr=1e-2)


def train(moe: moesaic.MoE, optimizer: AdamW) -> None:
    moe(torch.randn(6, 16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def check_checkpoint(before: dict[str, int], after: dict[str, int], num_experts: int, folder: str) -> None:
    _, saved, its_optimizer = make(before, 0, num_experts)
    train(saved, its_optimizer)
    checkpoint.save(folder, 1, training_state(saved, its_optimizer), {})
    _, loaded, optimizer = make(after, 1, num_experts)
    train(loaded, optimizer)
    state = training_state(loaded, optimizer)
    checkpoint.load(folder, state)
    restore(loaded, optimizer, state)
    for (name, a), b in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(whole(a), whole(b)), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(its_optimizer.state[a][moment]), whole(optimizer.state[b][moment])), name


@pytest.mark.parametrize(
    ("world_size", "num_experts", "before", "after"),
    [
        (4, 5, {"ep": 4}, {"ep": 2, "etp": 2}),
        (4, 5, {"ep": 2}, {"ep": 4}),
        # 5 and 4 experts, each over four ranks of FSDP.
        pytest.param(8, 9, {"ep": 2}, {"ep": 4, "etp": 2}, marks=pytest.mark.slow),
        (8, 9, {"ep": 8}, {"ep": 2}),
    ],
    ids=name_of,
)
def test_checkpoints_move_to_other_layouts(same_ranks, tmp_path, world_size, num_experts, before, after):
    same_ranks(check_checkpoint, world_size, before, after, num_experts, tmp_path)


def check_export(layout: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        moe_intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
    )
    plain = Qwen3MoeForCausalLM(config)
    expected = plain.state_dict()
    model = swap_moe(copy.deepcopy(plain))
    state = to_transformers_state_dict(moesaic.parallelize(model, moesaic.build_meshes(**layout, device_type="cpu")))
    assert state.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in state.items())


@pytest.mark.parametrize("layout", [{"ep": 4}, {"ep": 2}, {"ep": 2, "etp": 2}], ids=name_of)
def test_export(same_ranks, layout):
    same_ranks(check_export, 4, layout)
