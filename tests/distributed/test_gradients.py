"""`clip_grad_norm_` over parameters on several meshes."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from moesaic import clip_grad_norm_


def make_parameters() -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters on two meshes and on none, with the gradients they stand for."""
    torch.manual_seed(0)
    a = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    b = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "etp"))
    values = [torch.randn(6, 5, 3) for _ in range(5)]
    placed = [
        distribute_tensor(values[0], a, [Shard(0)]),
        distribute_tensor(values[1], a, [Replicate()]),
        distribute_tensor(values[2], b, [Shard(0), Shard(2)]),
        distribute_tensor(values[3], b, [Replicate(), Shard(1)]),
        values[4].clone(),
    ]
    parameters = [nn.Parameter(torch.zeros_like(t)) for t in placed]
    for p, t in zip(parameters, placed, strict=True):
        p.grad = t
    # A gradient that is still a sum to be made, as autograd leaves that of a replicated parameter.
    share = DTensor.from_local(values[1] / 4, a, [Partial()])
    parameters[1].grad = share
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
    for p, q in zip(parameters, plain, strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad, q.grad)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_norm_over_all_meshes(ranks, norm_type, foreach):
    ranks(check_norm, 4, norm_type, foreach)


def check_nonfinite() -> None:
    parameters, values = make_parameters()
    if torch.distributed.get_rank() == 2:
        grad = parameters[2].grad
        grad.to_local(grad_placements=grad.placements).view(-1)[0] = math.inf
    with pytest.raises(RuntimeError, match="total gradient norm is inf.*no gradient was changed"):
        clip_grad_norm_(parameters, 0.7, error_if_nonfinite=True)
    assert torch.equal(parameters[4].grad, values[4])


def test_every_rank_raises_where_one_is_not_finite(ranks):
    ranks(check_nonfinite, 4)


def test_half_precision_gradients_are_summed_in_fp32():
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.01)
    exact = float(p.grad[0]) * 100_000**0.5
    norm = clip_grad_norm_(p, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=2e-4)
    assert clip_grad_norm_([], 1.0).item() == 0
