"""The question of pytorch/torchtitan issue 434, answered: a grouped GEMM on DTensors, and a MoE layer made of it.

torchrun --standalone --nproc-per-node 4 examples/experts_on_a_mesh.py
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import moesaic


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    say = print if dist.get_rank() == 0 else lambda *_: None

    # The same four ranks twice: dp 2 x tp 2 for tokens, ep 2 x etp 2 for experts.
    meshes = moesaic.build_meshes(tp=2, ep=2, etp=2, device_type="cpu")
    mesh = meshes.expert["ep", "etp"]

    # 1. The operator. Two blocks of rows, one for each ep rank's three experts; inside a block the groups are ragged.
    x, w1, w2 = torch.randn(2 * 7, 16), torch.randn(6, 16, 24), torch.randn(6, 24, 16)
    group_sizes = torch.tensor([[2, 0, 4], [0, 0, 3]])
    with CommDebugMode() as comm:
        h = moesaic.grouped_mm(
            distribute_tensor(x, mesh, [Shard(0), Replicate()], src_data_rank=None),
            distribute_tensor(w1, mesh, [Shard(0), Shard(2)], src_data_rank=None),  # experts over ep, columns over etp
            sizes := distribute_tensor(group_sizes, mesh, [Shard(0), Replicate()], src_data_rank=None),
        )
        y = moesaic.grouped_mm(h, distribute_tensor(w2, mesh, [Shard(0), Shard(1)], src_data_rank=None), sizes)
    expected = moesaic.grouped_mm(moesaic.grouped_mm(x, w1, group_sizes), w2, group_sizes)
    say(f"x w1 is {h.placements}, (x w1) w2 is {y.placements}, collectives: {sum(comm.get_comm_counts().values())}")
    torch.testing.assert_close(y.full_tensor(), expected, rtol=1e-4, atol=1e-4)

    # 2. The layer. Every rank brings its own tokens, as many as it likes; the gate sees a shard of the sequence.
    config = moesaic.MoEConfig(dim=16, hidden_dim=24, num_experts=6, top_k=2)
    moe = moesaic.parallelize(moesaic.MoE(config), meshes)
    tokens = torch.randn(10 + dist.get_rank(), 16)
    moe(tokens).square().sum().backward()
    say(f"w1 is {moe.experts.w1.placements}, its gradient {moe.experts.w1.grad.placements}")
    say(f"gradient norm over all meshes: {moesaic.clip_grad_norm_(moe.parameters(), 1.0):.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
