"""Context parallelism: two sequences, each shared by two ranks, against one process.

torchrun --standalone --nproc-per-node 4 examples/context_parallel.py

Every rank is given the whole sequences of its dp rank, and computes its part of the positions. The rows hold several
documents, whose position_ids begin at 0 again, so that they do not see each other.
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.integrations.transformers import swap_moe

LENGTH, VOCAB = 30, 101  # a length that the four chunks of cp 2 do not divide


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCAB, head_dim=16, use_cache=False, **sizes, **experts))


dist.init_process_group("gloo")
meshes = moesaic.build_meshes(cp=2, ep=4, device_type="cpu")  # and so dp 2

ids = torch.randint(VOCAB, (meshes.dp_size, LENGTH), generator=torch.Generator().manual_seed(1))
documents = torch.cat([torch.arange(n) for n in (13, 10, 7)])
positions = documents.expand(meshes.dp_size, LENGTH)
labels = ids.masked_fill(positions == 0, -100)  # nothing says how a document begins
reference = swap_moe(make_model())
model = moesaic.parallelize(copy.deepcopy(reference), meshes)

expected = reference(input_ids=ids, position_ids=positions, labels=labels).loss
expected.backward()

mine = slice(meshes.dp_rank, meshes.dp_rank + 1)
out = model(input_ids=ids[mine], position_ids=positions[mine], labels=labels[mine])
out.loss.backward()

here = meshes.sequence_positions(LENGTH)
assert out.logits.shape == (1, len(here), VOCAB)
dist.all_reduce(total := out.loss.detach().clone())
torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=0)
worst = 0.0
for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
    grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
    worst = max(worst, float((grad - theirs.grad).norm() / theirs.grad.norm()))
assert worst < 1e-4, worst
print(f"rank {dist.get_rank()} has positions {here.tolist()}")
if dist.get_rank() == 0:
    print(f"loss {float(total):.6f}, one process {float(expected):.6f}; gradients differ by {worst:.0e}")
dist.destroy_process_group()
