"""Which exchange a layout gets, and why: from what the user says of nodes, or torchrun does."""

import os
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moesaic
from moesaic.parallel import Meshes

CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=16, top_k=4)


def members(meshes: Meshes) -> tuple[list[int], list[int]]:
    groups = meshes.nodes.groups
    assert groups is not None
    return dist.get_process_group_ranks(groups.across), dist.get_process_group_ranks(groups.within)


def check_layouts() -> None:
    def build(**options: int) -> Meshes:
        return moesaic.build_meshes(**options, device_type="cpu")

    rank = dist.get_rank()
    assert members(build(ep=8, ranks_per_node=4)) == (
        [rank % 4, rank % 4 + 4],
        [*range(rank // 4 * 4, rank // 4 * 4 + 4)],
    )
    # Ranks of etp share a node, and each has its own groups.
    across, within = members(build(ep=4, etp=2, ranks_per_node=4))
    assert across == [rank % 4, rank % 4 + 4]
    assert within == [rank - rank % 4 + rank % 2, rank - rank % 4 + rank % 2 + 2]
    # Stages of a pipeline are laid out alike.
    stages = init_device_mesh("cpu", (2, 1, 4, 1), mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
    across, within = members(build(mesh=stages, ep=4, ranks_per_node=2))
    assert across == [rank // 4 * 4 + rank % 2, rank // 4 * 4 + rank % 2 + 2]
    assert within == [rank // 2 * 2, rank // 2 * 2 + 1]
    for options, why in (
        ({"ep": 4, "ranks_per_node": 4}, "all ranks of ep are on one node"),
        ({"ep": 8, "ranks_per_node": 8}, "all ranks of ep are on one node"),
        ({"ep": 8, "ranks_per_node": 1}, "every rank of ep is on a node of its own"),
        ({"ep": 4, "etp": 2, "ranks_per_node": 2}, "every rank of ep is on a node of its own"),
        ({"ep": 2, "etp": 4, "ranks_per_node": 2}, "every rank of ep is on a node of its own"),
        # The ranks of a test were started on one node.
        ({"ep": 8}, "all ranks of ep are on one node"),
    ):
        exchange = build(**options).nodes.exchange(CONFIG)
        assert exchange.nodes is None
        assert exchange.why.startswith("one hop: ")
        assert why in exchange.why
    with mock.patch.dict(os.environ):
        del os.environ["LOCAL_WORLD_SIZE"]
        assert "give ranks_per_node" in build(ep=8).nodes.exchange(CONFIG).why


def test_layouts(same_ranks):
    same_ranks(check_layouts, 8)


def check_uneven() -> None:
    """Three of six ranks, two on a node."""
    said = r"of \[0, 1, 2\] it has 2, 1; of \[3, 4, 5\] it has 1, 2. Two hops need ep \* etp to be a multiple of 2"
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match=f"ranks_per_node: rows go straight to each rank, .*{said}"):
            meshes = moesaic.build_meshes(ep=3, device_type="cpu", ranks_per_node=2)
    else:
        meshes = moesaic.build_meshes(ep=3, device_type="cpu", ranks_per_node=2)
    assert re.search(said, meshes.nodes.exchange(CONFIG).why)
    moe = moesaic.parallelize(moesaic.MoE(CONFIG), meshes)
    moe(torch.randn(3, 8)).sum().backward()


def test_nodes_with_unequal_parts_of_ep(same_ranks):
    same_ranks(check_uneven, 6)


def launched(**other: int) -> mock._patch_dict:
    """What torchrun says where two ranks are on a node."""
    rank = dist.get_rank()
    said = {"LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank % 2, "RANK": rank, "WORLD_SIZE": dist.get_world_size()} | other
    return mock.patch.dict(os.environ, {name: str(value) for name, value in said.items()})


def check_default() -> None:
    with launched():
        meshes = moesaic.build_meshes(tp=4, ep=4, device_type="cpu")
    assert (meshes.nodes.ranks_per_node, meshes.nodes.given) == (2, False)
    why = meshes.nodes.exchange(CONFIG).why
    assert why == (
        "two hops, over 2 nodes and then over 2 ranks of each: "
        "about 0.96 rows a token cross between nodes, and 1.46 in one hop"
    )
    moe = moesaic.parallelize(moesaic.MoE(CONFIG), meshes)
    assert moe.dispatcher.nodes is meshes.nodes.groups
    # Where it would save nothing, or little, or nothing because of a capacity.
    for options, capacity, said in (
        (
            {"top_k": 1},
            None,
            "two would save little; about 0.50 rows a token cross between nodes in two, 0.50 in one hop",
        ),
        ({"top_k": 2, "weigh_inputs": True}, None, "two would save little"),
        ({}, 64, "with a capacity, as much goes to every rank"),
    ):
        config = moesaic.MoEConfig(**{"dim": 8, "hidden_dim": 6, "num_experts": 16, "top_k": 4} | options)
        assert said in meshes.nodes.exchange(config, capacity).why
        moe = moesaic.parallelize(moesaic.MoE(config), meshes, capacity=capacity)
        assert moe.dispatcher.nodes is None
    # Who says so gets it, but not with a capacity.
    given = moesaic.build_meshes(tp=4, ep=4, device_type="cpu", ranks_per_node=2)
    one = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=16, top_k=1)
    assert moesaic.parallelize(moesaic.MoE(one), given).dispatcher.nodes is not None
    with pytest.raises(ValueError, match=r"capacity: got 64, and ranks_per_node 2.*or give ranks_per_node 1"):
        moesaic.parallelize(moesaic.MoE(CONFIG), given, capacity=64)
    # Of another launch, another order of ranks, or on some ranks alone.
    for other in ({"WORLD_SIZE": 8}, {"LOCAL_RANK": dist.get_rank() // 2}, {"LOCAL_WORLD_SIZE": 3}):
        with launched(**other):
            assert moesaic.build_meshes(ep=4, device_type="cpu").nodes.ranks_per_node is None
    with launched(**({"RANK": 0} if dist.get_rank() == 3 else {})):
        assert moesaic.build_meshes(ep=4, device_type="cpu").nodes.ranks_per_node is None


def test_the_default_is_what_torchrun_started(same_ranks):
    same_ranks(check_default, 4)


def check_refusals() -> None:
    for value, error, said in (
        (3, ValueError, "got 3, and there are 4 ranks in all, as many on each node; choose one of 1, 2, 4"),
        (0, ValueError, "got 0"),
        (2.0, TypeError, "expected an int, got 2.0"),
    ):
        # On one rank alone, too: the others do not wait for it.
        for wrong in (value, value if dist.get_rank() == 2 else 2):
            with pytest.raises(error, match=f"ranks_per_node: {said}"):
                moesaic.build_meshes(ep=4, device_type="cpu", ranks_per_node=wrong)
    with pytest.raises(ValueError, match="ranks 0 and 3 ask for different meshes: .*, 2 ranks a node; and .*, 4 ranks"):
        moesaic.build_meshes(ep=4, device_type="cpu", ranks_per_node=4 if dist.get_rank() == 3 else 2)


def test_what_is_refused(same_ranks):
    same_ranks(check_refusals, 4)
