"""What the proof says of simulated ranks is what happens on real ones."""

import random

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moesaic
from moesaic.sharding.proof.placing import mesh_placements, split
from moesaic.sharding.proof.report import Report
from tests.sharding.planted import random as random_tensor
from tests.sharding.simulated import no_collectives

SIZES = torch.tensor([[2, 0, 3], [0, 0, 0], [1, 1, 1], [0, 6, 0]])


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return random_tensor(24, 5).double(), random_tensor(12, 5, 7).double(), SIZES


def on_ranks(shape: tuple[int, ...], admitted: list, refused: list) -> tuple[int, int]:
    """Every one of ``admitted`` is right without communication, every one of ``refused`` raises. How many."""
    mesh = init_device_mesh("cpu", shape)
    rank = torch.distributed.get_rank()
    expected = torch.ops.moesaic.grouped_mm(*inputs(), None)

    def place(placements) -> list[DTensor]:
        return [
            DTensor.from_local(
                split(t, p, shape, seed=i)[rank].clone(), mesh, p, run_check=False, shape=t.shape, stride=t.stride()
            )
            for i, (t, p) in enumerate(zip(inputs(), placements, strict=True))
        ]

    for given, (output,) in admitted:
        with no_collectives():
            result = torch.ops.moesaic.grouped_mm(*place(given), None)
        assert result.placements == output, given
        torch.testing.assert_close(result.full_tensor(), expected, rtol=1e-12, atol=1e-12)
    for given in refused:
        with pytest.raises(moesaic.ShardingError):
            torch.ops.moesaic.grouped_mm(*place(given), None)
    return len(admitted), len(refused)


def sample(report: Report, num_axes: int, number: int) -> tuple[list, list]:
    """Placements that the proof says are admitted and right, and placements that it says are refused."""
    admitted = [(r.inputs, r.outputs) for r in report.admitted if len(r.case.mesh) == num_axes]
    all_of_each = [list(mesh_placements(t.ndim, t.dtype, num_axes)) for t in inputs()]
    choose = random.Random(0)
    others = [tuple(map(choose.choice, all_of_each)) for _ in range(4 * number)]
    known = {given for given, _ in admitted}
    return choose.sample(admitted, min(number, len(admitted))), [c for c in others if c not in known][:number]


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_a_sample_on_real_ranks(ranks, unchecked, shape):
    meshes = [shape] if len(shape) > 1 else []
    report = moesaic.prove(torch.ops.moesaic.grouped_mm, *inputs(), None, axes=(4,), meshes=meshes, backward=False)
    assert report.ok
    admitted, refused = sample(report, len(shape), 20)
    counts = (len(admitted), len(refused))
    assert min(counts) >= 8
    assert ranks(on_ranks, 4, shape, admitted, refused) == [counts] * 4
