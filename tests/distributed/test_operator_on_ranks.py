"""`grouped_mm` on DTensors with what people use beside it: redistribution, FSDP2, recomputation, DCP, torch.compile."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import moesaic

# No size divides by its axis but the blocks; a group, and in the second problem a rank, has no rows.
EP, ETP, G, D, F = 2, 2, 3, 6, 7
SIZES = {"ragged": [[3, 0, 2], [1, 4, 0]], "an idle rank": [[0, 0, 0], [1, 4, 0]]}
DTYPES = [torch.float64, torch.bfloat16]


def mlp(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, sizes: Tensor) -> Tensor:
    h = nn.functional.silu(moesaic.grouped_mm(x, w1, sizes)) * moesaic.grouped_mm(x, w3, sizes)
    return moesaic.grouped_mm(h, w2, sizes)


def problem(sizes: Tensor, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Inputs x, w1, w3, w2; the result; and the gradients of the sum of its squares."""
    generator = torch.Generator().manual_seed(0)
    E, R = sizes.numel(), sizes.shape[0] * 5
    shapes = [(R, D), (E, D, F), (E, D, F), (E, F, D)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = mlp(*leaves, sizes)
    return inputs, y.detach(), list(torch.autograd.grad(y.square().sum(), leaves))


PLACEMENTS = ([Shard(0), Replicate()], [Shard(0), Shard(2)], [Shard(0), Shard(2)], [Shard(0), Shard(1)])


def place(tensors: list[Tensor], mesh: DeviceMesh) -> list[DTensor]:
    pairs = zip(tensors, PLACEMENTS, strict=True)
    return [distribute_tensor(t, mesh, p, src_data_rank=None).requires_grad_() for t, p in pairs]


def redistribute_everywhere(name: str, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (EP, ETP), mesh_dim_names=("ep", "etp"))
    sizes = torch.tensor(SIZES[name])
    inputs, expected, expected_grads = problem(sizes, dtype)
    sizes_d = distribute_tensor(sizes, mesh, [Shard(0), Replicate()], src_data_rank=None)
    leaves = place(inputs, mesh)

    def check(ours: Tensor, theirs: Tensor) -> None:
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < (1e-12 if dtype == torch.float64 else 2e-2), error

    hidden, y = moesaic.grouped_mm(*leaves[:2], sizes_d), mlp(*leaves, sizes_d)
    assert hidden.placements == (Shard(0), Shard(1))
    assert y.placements == (Shard(0), Partial())
    cases: list[tuple[DTensor, Tensor]] = [(y, expected), (hidden, moesaic.grouped_mm(inputs[0], inputs[1], sizes))]
    targets: list[list[Placement]] = [
        [Replicate(), Replicate()],
        [Shard(0), Replicate()],
        [Shard(0), Shard(0)],
        [Shard(1), Shard(0)],
        [Replicate(), Shard(1)],
    ]
    for t, value in cases:
        check(t.full_tensor(), value)
        for target in targets:
            moved = t.redistribute(placements=target)
            assert list(moved.placements) == target
            check(moved.full_tensor(), value)
    y.square().sum().backward()
    for leaf, theirs in zip(leaves, expected_grads, strict=True):
        check(leaf.grad.full_tensor(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_results_and_gradients_go_wherever_they_are_sent(same_ranks, name, dtype):
    same_ranks(redistribute_everywhere, EP * ETP, name, dtype)


class Experts(nn.Module):
    """SwiGLU experts whose hidden dim is sharded over ``mesh``, recomputed in the backward pass if asked to."""

    def __init__(self, weights: list[Tensor], mesh: DeviceMesh | None, *, recompute: bool = False) -> None:
        super().__init__()
        if mesh is not None:
            pairs = zip(weights, (2, 2, 1), strict=True)
            weights = [distribute_tensor(w, mesh, [Shard(d)], src_data_rank=None) for w, d in pairs]
        self.w1, self.w3, self.w2 = map(nn.Parameter, weights)
        self.recompute = recompute

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        args = (x, self.w1, self.w3, self.w2, sizes)
        return checkpoint(mlp, *args, use_reentrant=False) if self.recompute else mlp(*args)


def train_sharded(recompute: bool) -> None:
    """Tokens and FSDP over dp, hidden dim over etp: the gradients and weights of one process with all tokens."""
    mesh = init_device_mesh("cpu", (2, ETP), mesh_dim_names=("dp", "etp"))
    sizes = torch.tensor(SIZES["ragged"])  # a block a dp rank, experts shared
    (x, *_), _, _ = problem(sizes)
    weights = problem(torch.tensor([[1] * G]))[0][1:]
    alone = Experts([w.clone() for w in weights], None)
    sharded = Experts([w.clone() for w in weights], mesh["etp"], recompute=recompute)
    fully_shard(sharded, mesh=mesh["dp"])
    sharded.set_gradient_divide_factor(1.0)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (alone, sharded)]
    here = slice(mesh.get_local_rank("dp"), mesh.get_local_rank("dp") + 1)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        alone(x, sizes).square().sum().backward()
        x_d, sizes_d = (
            distribute_tensor(t, mesh["etp"], [Replicate()], src_data_rank=None)
            for t in (x.unflatten(0, (2, -1))[here].flatten(0, 1), sizes[here])
        )
        y = sharded(x_d, sizes_d)
        assert y.placements == (Partial(),)
        y.redistribute(placements=[Replicate()]).square().sum().backward()
        for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
        for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_fsdp_and_recomputation(same_ranks, recompute):
    same_ranks(train_sharded, 2 * ETP, recompute)


LAYOUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((2, 2), [Shard(0), Shard(2)]),
    ((2, 2), [Shard(2), Shard(0)]),
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((4,), [Replicate()]),
]


def save_and_load(folder: Path) -> None:
    weight = torch.randn(5, D, F, generator=torch.Generator().manual_seed(0))

    def placed(shape: tuple[int, ...], placements: list[Placement], value: Tensor) -> DTensor:
        return distribute_tensor(value, init_device_mesh("cpu", shape), placements, src_data_rank=None)

    for i, layout in enumerate(LAYOUTS):
        dcp.save({"w": placed(*layout, weight)}, checkpoint_id=folder / str(i))
        for other in LAYOUTS:
            state = {"w": placed(*other, torch.zeros_like(weight))}
            dcp.load(state, checkpoint_id=folder / str(i))
            assert torch.equal(state["w"].full_tensor(), weight), (layout, other)


def test_weights_are_loaded_at_other_layouts(same_ranks, tmp_path):
    same_ranks(save_and_load, 4, tmp_path)


COMPILED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from tests.distributed.test_operator_on_ranks import D, ETP, EP, F, G, PLACEMENTS, mlp

# Every rank's program is the same; this is rank 0's. Nothing communicates, so nothing is missing.
dist.init_process_group("fake", rank=0, world_size=EP * ETP)
mesh = init_device_mesh("cpu", (EP, ETP), mesh_dim_names=("ep", "etp"))
torch.manual_seed(0)
compiled = torch.compile(mlp, fullgraph=True, dynamic=True)

def local(*shape):
    return torch.randn(shape)

half = -(-F // ETP)
shapes = [(EP * G, D, F), (EP * G, D, F), (EP * G, F, D)]
weights = [local(G, D, half), local(G, D, half), local(G, half, D)]
for rows in (5, 9, 5, 17):
    sizes = torch.tensor([[2, 0, 3]])
    results = []
    for function in (mlp, compiled):
        torch.manual_seed(rows)
        locals_ = [local(rows, D), *weights]
        leaves = [
            DTensor.from_local(t, mesh, p, run_check=False, shape=s, stride=torch.empty(s).stride()).requires_grad_()
            for t, p, s in zip(locals_, PLACEMENTS, [(EP * rows, D), *shapes])
        ]
        sizes_d = DTensor.from_local(sizes, mesh, [Shard(0), Replicate()], run_check=False)
        y = function(*leaves, sizes_d)
        grad = DTensor.from_local(torch.ones(rows, D), mesh, [Shard(0), Replicate()], run_check=False)
        grads = torch.autograd.grad(y, leaves, grad)
        results.append((y, *grads))
    for eager, fast in zip(*results):
        assert eager.placements == fast.placements and eager.shape == fast.shape
        torch.testing.assert_close(fast.to_local(), eager.to_local())
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
print("same")
"""


@pytest.mark.long
def test_compiled_in_one_graph(forked_python):
    assert "same" in forked_python(COMPILED).stdout
