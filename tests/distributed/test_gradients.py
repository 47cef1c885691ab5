"""`clip_grad_norm_` over parameters on several meshes."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from moesaic import clip_grad_norm_

WORLD = 4


def make_parameters() -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters on three meshes and on none, with the gradients they stand for."""
    torch.manual_seed(0)
    a = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp",))
    b = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "etp"))
    meshes_and_placements = [
        (a, [Shard(0)]),  # uneven: 6 rows on 4 ranks
        (a, [Shard(2)]),  # 3 on 4: the last rank has none
        (a, [Replicate()]),
        (b, [Shard(0), Shard(2)]),
        (b, [Replicate(), Shard(1)]),  # HSDP's
        (b["etp"], [Shard(0)]),  # on each row of ranks by itself
        (b["ep"], [Replicate()]),
    ]
    values = [torch.randn(6, 5, 3) for _ in meshes_and_placements]
    placed = [distribute_tensor(v, *where) for v, where in zip(values, meshes_and_placements, strict=True)]
    # As autograd leaves gradients of replicated parameters: sums that are still to be made.
    values += [torch.randn(6, 5, 3), torch.randn(6, 5, 3)]
    placed.append(DTensor.from_local(values[-2] / WORLD, a, [Partial()]))
    share = distribute_tensor(values[-1] / 2, b, [Replicate(), Shard(1)]).to_local()
    placed.append(
        DTensor.from_local(share, b, [Partial(), Shard(1)], run_check=False, shape=(6, 5, 3), stride=(15, 3, 1))
    )
    values.append(torch.randn(6, 5, 3))
    placed.append(values[-1].clone())
    parameters = [nn.Parameter(torch.zeros_like(t)) for t in placed]
    for p, t in zip(parameters, placed, strict=True):
        p.grad = t
    return parameters, values


def check_norm(norm_type: float, foreach: bool | None) -> None:
    parameters, values = make_parameters()
    plain = [nn.Parameter(torch.zeros_like(v)) for v in values]
    for p, v in zip(plain, values, strict=True):
        p.grad = v.clone()
    unused = nn.Parameter(torch.zeros(3))
    expected = torch.nn.utils.clip_grad_norm_(plain, 0.7, norm_type)
    norm = clip_grad_norm_([*parameters, unused], 0.7, norm_type=norm_type, foreach=foreach)
    assert type(norm) is Tensor
    torch.testing.assert_close(norm, expected)
    gathered = [torch.empty_like(norm) for _ in range(WORLD)]
    torch.distributed.all_gather(gathered, norm)
    assert all(torch.equal(norm, other) for other in gathered)
    for p, q in zip(parameters, plain, strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad, q.grad)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
def test_norm_over_all_meshes(same_ranks, norm_type, foreach):
    same_ranks(check_norm, WORLD, norm_type, foreach)


def check_strided() -> None:
    """FSDP2 over tensor parallelism, whose shards are strided; no collective but one, however many meshes."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    value = torch.randn(7, 6)
    layer = nn.Linear(6, 7, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(value, mesh["tp"], [Shard(0)]))
    fully_shard(layer, mesh=mesh["dp"])
    assert not layer.weight.placements[0].is_shard()
    layer.weight.grad = layer.weight.detach().clone()
    flat = nn.Parameter(distribute_tensor(value, init_device_mesh("cpu", (WORLD,)), [Shard(1)]))
    flat.grad = flat.detach().clone()
    with CommDebugMode() as comms:
        norm = clip_grad_norm_([layer.weight, flat], 1.0)
    assert sum(comms.get_comm_counts().values()) == 1
    torch.testing.assert_close(norm, value.norm() * 2**0.5)
    torch.testing.assert_close(flat.grad.full_tensor(), value / norm)
    torch.testing.assert_close(layer.weight.grad.full_tensor(), value / norm)


def test_strided_shards_and_one_collective(same_ranks):
    same_ranks(check_strided, WORLD)


def check_stages(norm_type: float) -> None:
    """Two stages: the gradients of one lie on a mesh and on none; those of the other are plain, and in fp64."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, group = mesh.get_local_rank("pp"), mesh["pp"].get_group()
    torch.manual_seed(0)
    sharded, plain, others = torch.randn(3, 4, 3)
    everything = [t.clone().requires_grad_() for t in (sharded, plain, others)]
    for t in everything:
        t.grad = t.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(everything, 0.7, norm_type)
    placed = distribute_tensor(sharded, mesh["dp"], [Shard(0)], src_data_rank=None)
    parameters = [nn.Parameter(t) for t in ((placed, plain) if stage == 0 else (others.double(),))]
    for p in parameters:
        p.grad = p.detach().clone()
    norm = clip_grad_norm_(parameters, 0.7, norm_type=norm_type, group=group)
    torch.testing.assert_close(norm, expected, check_dtype=False)
    assert norm.dtype == (torch.float32 if stage == 0 else torch.float64)
    for p, q in zip(parameters, everything[:2] if stage == 0 else everything[2:], strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad, q.grad, check_dtype=False)
    # A stage without gradients takes part.
    norm = clip_grad_norm_(parameters if stage == 0 else [], 1e9, group=group)
    torch.testing.assert_close(norm, torch.stack([t.grad for t in everything[:2]]).norm())
    with pytest.raises(ValueError, match=r"group: its ranks \[., .\] hold shards of the same"):
        clip_grad_norm_(placed_on(mesh["dp"]), 1.0, group=torch.distributed.group.WORLD)
    with pytest.raises(ValueError, match=r"group: .* such as mesh\['pp'\].get_group\(\), got DeviceMesh"):
        clip_grad_norm_(parameters, 1.0, group=mesh["pp"])


def placed_on(mesh) -> list[nn.Parameter]:
    return [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None))]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_stages_share_a_norm(same_ranks, norm_type):
    same_ranks(check_stages, WORLD, norm_type)


def check_nonfinite() -> None:
    for poisoned in (3, 2):  # a shard; one copy of many
        parameters, values = make_parameters()
        if torch.distributed.get_rank() == 2:
            parameters[poisoned].grad.to_local().view(-1)[0] = math.inf
        with pytest.raises(RuntimeError, match="total gradient norm is inf.*no gradient was changed"):
            clip_grad_norm_(parameters, 0.7, error_if_nonfinite=True)
        assert torch.equal(parameters[-1].grad, values[-1])


def test_every_rank_raises_where_one_is_not_finite(same_ranks):
    same_ranks(check_nonfinite, WORLD)


def test_a_norm_of_order_zero_is_refused():
    with pytest.raises(ValueError, match="norm_type: expected a number above 0 or inf, got 0.0"):
        clip_grad_norm_([], 1.0, norm_type=0.0)


def test_half_precision_gradients_are_summed_in_fp32():
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.01)
    exact = float(p.grad[0]) * 100_000**0.5
    norm = clip_grad_norm_(p, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=2e-4)
    assert clip_grad_norm_([], 1.0).item() == 0
