"""Meshes that users bring, and ranks that bring something else than the others."""

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moesaic
from moesaic.ops import fastest, native
from moesaic.ops.choices import CASES
from moesaic.parallel import build_meshes, parallelize
from tests.ops.cpu_isa import needs_kernels

CONFIG = moesaic.MoEConfig(dim=8, hidden_dim=6, num_experts=4, top_k=2)


def mesh_of(**axes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def check_stages() -> None:
    world = mesh_of(pp=2, dp_replicate=1, dp_shard=2, tp=1)
    stage = world.get_local_rank("pp")
    own = [2 * stage, 2 * stage + 1]
    experts = mesh_of(pp=2, edp=1, ep=2, etp=1)
    sliced = world["dp_replicate", "dp_shard", "tp"]
    for brought in (
        {"pp": 2, "ep": 2, "device_type": "cpu"},
        {"mesh": world, "ep": 2},
        {"mesh": sliced, "ep": 2},
        {"mesh": world, "expert_mesh": experts},
    ):
        meshes = build_meshes(**brought)
        said = "dp_replicate 1 x dp_shard 2 x tp 1, experts edp 1 x ep 2 x etp 1"
        if brought.get("mesh") is sliced:
            # Nothing is known of other slices.
            assert (str(meshes.layout), meshes.pp_size, meshes.pp_rank, meshes.stages) == (said, 1, 0, None)
        else:
            assert (str(meshes.layout), meshes.pp_size, meshes.pp_rank) == (f"pp 2, each {said}", 2, stage)
            assert dist.get_process_group_ranks(meshes.stages) == [dist.get_rank() % 2, dist.get_rank() % 2 + 2]
        if "mesh" in brought:
            assert meshes.dense.get_group("dp_shard") is world.get_group("dp_shard")
        assert [dist.get_process_group_ranks(meshes.expert.get_group(axis)) for axis in ("edp", "ep", "etp")] == [
            [dist.get_rank()],
            own,
            [dist.get_rank()],
        ]
        assert dist.get_process_group_ranks(meshes.all_ranks()) == own
    assert meshes.expert.get_group("ep") is experts.get_group("ep")
    assert build_meshes(expert_mesh=experts, tp=2).tp_rank == dist.get_rank() % 2

    # A stage keeps its own weights, and waits for no other one.
    torch.manual_seed(stage)
    moe = moesaic.MoE(CONFIG)
    w1 = moe.experts.w1.detach().clone()
    if stage == 1:
        parallelize(moe, meshes)
        assert torch.equal(moe.experts.w1.full_tensor(), w1)


def test_each_stage_has_its_own_ranks(same_ranks):
    same_ranks(check_stages, 4)


def check_refusals() -> None:
    rank = dist.get_rank()
    named = {"mesh_dim_names": ("pp", "dp_replicate", "dp_shard", "tp")}
    world = init_device_mesh("cpu", (2, 1, 2, 1), **named)
    with pytest.raises(
        ValueError, match="mesh: it has no axis 'dp_replicate', 'dp_shard', 'tp'; its axes have no names"
    ):
        build_meshes(mesh=init_device_mesh("cpu", (2, 2)))
    with pytest.raises(
        ValueError, match=r"to be dp_replicate, .* it has pp 2 x dp 2. If ranks along 'dp' hold the same"
    ):
        build_meshes(mesh=mesh_of(pp=2, dp=2))
    with pytest.raises(
        ValueError, match="mesh: it has no axis 'dp_replicate', 'tp'; it has pp 2 x dp_shard 2"
    ) as error:
        build_meshes(mesh=mesh_of(pp=2, dp_shard=2))
    remedy = re.search(r"init_device_mesh\(.*\)", str(error.value))[0]
    assert build_meshes(mesh=eval(remedy)).layout.dp_shard == 2
    with pytest.raises(ValueError, match="expert_mesh: it has no axis 'etp'; it has edp 2 x ep 2"):
        build_meshes(expert_mesh=mesh_of(edp=2, ep=2))
    with pytest.raises(ValueError, match="tp: got 2, and mesh has 1; leave tp out"):
        build_meshes(mesh=world, tp=2)
    with pytest.raises(ValueError, match="device_type: got 'cuda', and mesh is on 'cpu'"):
        build_meshes(mesh=world, device_type="cuda")
    with pytest.raises(
        ValueError, match=rf"ep \* etp .* must divide the size of a stage 2 .* over ranks \[{rank - rank % 2}, "
    ):
        build_meshes(mesh=world, ep=3)
    with pytest.raises(ValueError, match="pp: got 4, and mesh has 2; leave pp out"):
        build_meshes(mesh=world, pp=4)
    with pytest.raises(ValueError, match=r"expert_mesh: it has 1 stages \(pp\), and mesh 2; bring both with pp"):
        build_meshes(mesh=world, expert_mesh=mesh_of(edp=2, ep=2, etp=1))
    with pytest.raises(ValueError, match=r"expert_mesh: it is over ranks \[0, 1, 2, 3\], and mesh over "):
        build_meshes(mesh=world["dp_replicate", "dp_shard", "tp"], expert_mesh=mesh_of(edp=2, ep=2, etp=1))
    # What one rank does wrong, all are told.
    with pytest.raises(ValueError, match=r"ranks 0 and 3 ask for different meshes: .* ep 1 .* and .* ep 2 "):
        build_meshes(ep=2 if rank == 3 else 1)
    with pytest.raises(ValueError, match="ranks 0 and 3 ask for different meshes: .* on cpu, dense mesh brought; and"):
        build_meshes(mesh=None if rank == 3 else mesh_over(0, 1, 2, 3), device_type="cpu")
    with pytest.raises(ValueError, match=r"meshes over ranks \[0, 1\], \[1, 2\], \[2, 3\]. These overlap"):
        build_meshes(mesh=[mesh_over(0, 1), mesh_over(1, 2), mesh_over(2, 3), mesh_over(2, 3)][rank])
    with pytest.raises(ValueError, match=r"mesh: rank 3 is not in it"):
        build_meshes(mesh=mesh_over(0, 1, 2))


def mesh_over(*ranks: int) -> DeviceMesh:
    """A mesh that says it is over these ranks; its groups are never used."""
    return DeviceMesh(
        "cpu", [[[r] for r in ranks]], mesh_dim_names=("dp_replicate", "dp_shard", "tp"), _init_backend=False
    )


def test_wrong_meshes_are_refused_on_all_ranks(same_ranks):
    same_ranks(check_refusals, 4)


def changed(model: nn.Sequential, how: str) -> nn.Module:
    """The model, or one that differs from it."""
    first, second = model
    match how:
        case "name":
            model.register_buffer("scale", torch.ones(3))
        case "shape":
            model[0] = moesaic.MoE(replace(CONFIG, hidden_dim=8))
        case "dtype":
            first.half()
        case "tie":
            second.router.weight = first.router.weight
        case "frozen":
            second.router.requires_grad_(False)
        case "config":
            model[0] = moesaic.MoE(replace(CONFIG, top_k=1))
        case "order":
            model._modules = dict(reversed(model._modules.items()))
        case "no experts":
            return nn.Linear(8, 8)
    return model


DIFFERENCES = {
    "name": r"buffer 'scale' is missing on rank 0, and \[3\] torch.float32 on rank 1",
    "shape": r"'0.experts.w1' is \[4, 8, 6\] torch.float32 on rank 0, and \[4, 8, 8\] torch.float32 on rank 1",
    "dtype": r"'0.router.weight' is \[4, 8\] torch.float32 on rank 0, and \[4, 8\] torch.float16 on rank 1",
    "tie": r"'1.router.weight' is \[4, 8\] .* on rank 0, and the same as '0.router.weight' on rank 1",
    "frozen": r"'1.router.weight' is .* torch.float32, frozen on rank 1",
    "config": r"layer '0' is MoEConfig\(.*top_k=2.* on rank 0, and .*top_k=1",
    "order": "where rank 0 has parameter '0.router.weight', rank 1 has parameter '1.router.weight'",
    "no experts": "no moesaic.MoE layer",
}


def check_different_models() -> None:
    meshes = build_meshes()
    for how, text in DIFFERENCES.items():
        model = nn.Sequential(moesaic.MoE(CONFIG), moesaic.MoE(CONFIG))
        if dist.get_rank() == 1:
            model = changed(model, how)
        with pytest.raises(ValueError, match=text):
            parallelize(model, meshes)


def test_different_models_are_told_apart_before_one_overwrites_the_other(same_ranks):
    same_ranks(check_different_models, 2)


KERNELS, PRODUCTS = (dict.fromkeys(CASES, name) for name in ("cpu", "torch"))


def _parallelize(own: dict, kernels_are_here: bool = True) -> None:
    fastest.use(own)
    there, native.kernels = native.kernels, native.kernels if kernels_are_here else lambda: "they were not built"
    try:
        parallelize(moesaic.MoE(CONFIG), build_meshes(ep=2, device_type="cpu"))
    finally:
        native.kernels = there


def check_choices() -> None:
    first = dist.get_rank() == 0
    try:
        for of_first in (KERNELS, PRODUCTS):
            other = PRODUCTS if of_first is KERNELS else KERNELS
            _parallelize(of_first if first else other)
            assert fastest.in_force() == of_first
        told = "rank 0 computes experts with the CPU kernels, and there are none here: they were not built"
        with pytest.raises(RuntimeError, match=told):
            _parallelize(KERNELS if first else PRODUCTS, kernels_are_here=first)
        assert fastest.in_force() == (KERNELS if first else PRODUCTS)
    finally:
        fastest.use(None)


@needs_kernels
def test_the_choice_is_that_of_the_first_rank(same_ranks):
    same_ranks(check_choices, 2)
