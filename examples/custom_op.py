"""Your own grouped GEMM on DTensors: pytorch/torchtitan issue 434 from nothing, checked against one process.

torchrun --standalone --nproc-per-node 4 examples/custom_op.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, SequenceParallel

import moesaic
from moesaic.ops import combine, permute, sort_by_expert


# 1. The operators: your kernels, one line each. Rows are in blocks, and each block has experts of its own.
@moesaic.sharding_rule("(b c) k, (b g) k n, b g -> (b c) n", linear=["x", "w"], redistribute=["x"])
@torch.library.custom_op("example::grouped_gemm", mutates_args=())
def grouped_gemm(x: Tensor, w: Tensor, sizes: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], w.shape[2])
    for expert, rows in enumerate(groups(x, sizes)):
        y[rows] = x[rows] @ w[expert]
    return y


@moesaic.sharding_rule("(b c) k, (b c) n, b g, ~(b g) k n -> (b g) k n", linear=["x", "grad"], redistribute=["grad"])
@torch.library.custom_op("example::grouped_gemm_weight_grad", mutates_args=())
def weight_grad(x: Tensor, grad: Tensor, sizes: Tensor, w: Tensor) -> Tensor:
    return torch.stack([x[rows].mT @ grad[rows] for rows in groups(x, sizes)])


def groups(x: Tensor, sizes: Tensor) -> list[slice]:
    starts = sizes.cumsum(1) - sizes + torch.arange(len(sizes))[:, None] * (len(x) // len(sizes))
    return [slice(start, start + size) for start, size in zip(starts.flatten(), sizes.flatten(), strict=True)]


def gradient(ctx, grad: Tensor):
    x, w, sizes = ctx.saved_tensors
    return grouped_gemm(grad, w.mT, sizes), weight_grad(x, grad, sizes, w), None


grouped_gemm.register_fake(lambda x, w, sizes: x.new_empty(x.shape[0], w.shape[2]))
weight_grad.register_fake(lambda x, grad, sizes, w: w.new_empty(w.shape))
grouped_gemm.register_autograd(gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


# 2. A style as for nn.Linear: experts over ep; over etp the columns (dim 2) or the rows (dim 1) of each.
class ExpertsParallel(ParallelStyle):
    def __init__(self, **dims: int):
        self.dims = dims

    def _apply(self, module: nn.Module, device_mesh) -> None:
        for name, dim in self.dims.items():
            weight = distribute_tensor(getattr(module, name), device_mesh, [Shard(0), Shard(dim)])
            setattr(module, name, nn.Parameter(weight))


# 3. A layer on the (ep, etp) mesh. Each ep rank sees all tokens and takes the rows of its own experts: its block.
class MoE(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def everywhere(t: Tensor, grad_over_etp) -> Tensor:
            t = DTensor.from_local(t, mesh, [Shard(0), Shard(0)]).redistribute(placements=[Replicate()] * 2)
            return t.to_local(grad_placements=[Partial(), grad_over_etp])

        weights, ids = self.gate(x).softmax(-1).topk(2)  # of this rank's part of the sequence
        # Over ep gradients are parts. Over etp those of the weights are, while `rows` has summed its own.
        x, weights, ids = everywhere(x, Replicate()), everywhere(weights, Partial()), everywhere(ids, Partial())
        num_local = len(self.w1) // mesh["ep"].size()
        ids = torch.where(ids // num_local == mesh.get_local_rank("ep"), ids % num_local, -1)
        order = sort_by_expert(ids, num_local, num_rows=ids.numel())
        rows = DTensor.from_local(permute(x, order), mesh, [Shard(0), Replicate()])
        sizes = DTensor.from_local(order.group_sizes[None], mesh, [Shard(0), Replicate()])
        h = nn.functional.silu(grouped_gemm(rows, self.w1, sizes)) * grouped_gemm(rows, self.w3, sizes)
        y = grouped_gemm(h, self.w2, sizes)  # [Shard(0), Partial()], without a collective since `rows`
        z = combine(y.to_local(grad_placements=[Shard(0), Replicate()]), order, weights)
        return DTensor.from_local(z, mesh, [Partial(), Partial()]).redistribute(placements=[Shard(0), Shard(0)])


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "etp"))
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
moe, x, upstream, shapes = MoE(), *torch.randn(2, 20, 16), [(6, 16, 22), (6, 16, 22), (6, 22, 16)]
moe.gate, (moe.w1, moe.w3, moe.w2) = nn.Linear(16, 6), (nn.Parameter(torch.randn(shape)) for shape in shapes)
weights, ids = moe.gate(x).softmax(-1).topk(2)
every_expert = (nn.functional.silu(x @ moe.w1) * (x @ moe.w3)) @ moe.w2
expected = (every_expert[ids, torch.arange(20)[:, None]] * weights.unsqueeze(-1)).sum(1)
expected_grads = torch.autograd.grad(expected, list(moe.parameters()), upstream)
SequenceParallel(sequence_dim=0, use_local_output=True)._apply(moe.gate, init_device_mesh("cpu", (4,)))
ExpertsParallel(w1=2, w3=2, w2=1)._apply(moe, mesh)
y = moe(x.chunk(4)[dist.get_rank()])
y.backward(distribute_tensor(upstream, mesh, [Shard(0), Shard(0)]))
grads = [parameter.grad.full_tensor() for parameter in moe.parameters()]
torch.testing.assert_close([y.full_tensor(), *grads], [expected, *expected_grads])
if dist.get_rank() == 0:
    print(f"experts {tuple(moe.w1.placements)}: output and all gradients are those of one process")
dist.barrier()
dist.destroy_process_group()
